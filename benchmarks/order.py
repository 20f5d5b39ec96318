"""The plan: how well its order mixes, what it reads, and what it costs at the size of a corpus.

    python -m benchmarks.order [mixing scale] [key=value ...]

`mixing`: the variance of the mean of a batch, over that of samples drawn at random (1 is perfect),
for samples in the order of the stream, in windows of blocks as the plan draws them, and permuted as
a whole. What is averaged is the unigram entropy of a sample's tokens, which tells documents apart.
The default corpus is smaller than one window, so blocks are scaled down with it: a window is
1/`windows` of the corpus, and cut into as many blocks as a real one. What is in excess of 1 grows
with the share of a window that a batch takes, and with the samples that a document fills.

`scale`: seconds and bytes for corpora of up to 1.3 T tokens, whose shards are empty files with a
true manifest: opening it, checking it, pickling it, locating samples. Prints tables and writes
benchmarks/results/order.json.
"""

from __future__ import annotations

import pickle
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks._runs import open_source, print_table, run_benchmark
from modular_lm.config.schema import DataConfig, TokenizerConfig, key
from modular_lm.data.dataset import Dataset
from modular_lm.data.manifest import Manifest, ShardInfo, Split
from modular_lm.data.permutation import WINDOW_BLOCKS, Blocks, epoch_order, permute
from modular_lm.tokenizer import build_tokenizer

CORPORA = {"10BT": 10 * 10**9, "100BT": 100 * 10**9, "1.3T": 1300 * 10**9}
# As prepare chooses: 64 MiB of text a shard, at most 2,048 shards.
SHARD_TOKENS = 15_000_000
MOST_SHARDS = 2_048


@dataclass
class Options:
    seq_len: int = key(512, "tokens per sample", ge=1)
    batch: int = key(64, "samples of a batch", ge=2)
    windows: int = key(8, "windows that the corpus is cut into", ge=1)
    root_dir: str | None = key(None, "folder of prepared sources; default: the built-in corpus")
    source: str = key("builtin", "name of the source")
    tokenizer: TokenizerConfig = key(TokenizerConfig, "tokenizer of the source")


# ------------------------------------------------------------------ mixing


def mixing(options: Options) -> dict[str, Any]:
    data = open_data(options)
    reader = data._readers[0]
    n = reader.n_windows(options.seq_len)
    tokens = reader.windows(np.arange(n), options.seq_len)[:, 1:]
    value = sample_entropy(tokens)
    blocks = Blocks(max(1, n // options.windows // WINDOW_BLOCKS))
    everything = np.arange(n)
    orders: dict[str, Callable[[int], np.ndarray]] = {
        "stream": lambda key: (everything + key * 977) % n,
        "windows of blocks": lambda key: epoch_order(everything, n, key, blocks),
        "all permuted": lambda key: permute(everything, n, key),
    }
    print(f"{n:,} samples of {options.seq_len} tokens; blocks of {blocks.samples} samples")
    found = {name: ratios(value, order, options.batch) for name, order in orders.items()}
    print_table(
        ["order", "variance of a batch / at random", "deviation over epochs"],
        ([name, f"{np.mean(r):.3f}", f"{np.std(r):.3f}"] for name, r in found.items()),
    )
    return {"samples": n, "block_samples": blocks.samples, "variance_ratios": found}


def sample_entropy(tokens: np.ndarray) -> np.ndarray:
    """Mean negative log of the unigram frequency of the tokens of each sample, [n]."""
    counts = np.bincount(tokens.ravel(), minlength=int(tokens.max()) + 1)
    nll = -np.log(np.maximum(counts, 1) / counts.sum())
    return nll[tokens].mean(1)


def ratios(value: np.ndarray, order: Callable[[int], np.ndarray], batch: int) -> list[float]:
    """Variance of batch means over that of independent draws, of twenty epochs."""
    n = len(value) // batch * batch
    found = []
    for epoch in range(20):
        means = value[order(epoch + 1)][:n].reshape(-1, batch).mean(1)
        found.append(float(means.var() / (value.var() / batch)))
    return found


# ------------------------------------------------------------------ scale


def scale(options: Options) -> dict[str, Any]:
    header = ["corpus", "shards", "manifest (MB)", "open (s)", "pickle (kB)", "unpickle (s)"]
    header += ["locate 1 M tokens (ms)", "memory (MB)"]
    found: dict[str, Any] = {}
    print_table(header, scale_rows(found))
    return found


def scale_rows(found: dict[str, Any]) -> Iterator[list[str]]:
    for name, total in CORPORA.items():
        with tempfile.TemporaryDirectory() as folder:
            shard_tokens = max(SHARD_TOKENS, -(-total // MOST_SHARDS))
            shards = make_corpus(Path(folder) / "corpus", total, shard_tokens)
            size = (Path(folder) / "corpus" / "manifest.json").stat().st_size
            found[name] = {"shards": shards, "manifest_bytes": size, **cost(folder)}
        f = found[name]
        yield [
            name, f"{shards:,}", f"{size / 1e6:.1f}", f"{f['open_seconds']:.2f}",
            f"{f['pickle_bytes'] / 1e3:.1f}", f"{f['unpickle_seconds']:.2f}",
            f"{1e3 * f['locate_seconds']:.1f}", f"{f['memory_bytes'] / 1e6:.0f}",
        ]  # fmt: skip


def make_corpus(folder: Path, total: int, shard_tokens: int) -> int:
    """A source of `total` tokens whose shards are holes of the right size; how many there are."""
    folder.mkdir(parents=True)
    template = Manifest.load(next(iter(open_data(Options()).folders.values())))
    count = -(-total // shard_tokens)
    shards = [
        ShardInfo(
            f"train-{i:05d}.parquet", shard_tokens // 1000, shard_tokens,
            4 * shard_tokens, 2 * shard_tokens, f"{i:064x}",
        )
        for i in range(count)
    ]  # fmt: skip
    for shard in shards:
        with open(folder / shard.file, "wb") as file:
            file.truncate(shard.size)
    values = {**vars(template), "train": Split.of(shards), "val": Split.of([])}
    Manifest(**values).save(folder)
    return count


def cost(root: str) -> dict[str, float]:
    """What a process pays to open the corpus as a data set, and for each million tokens."""
    config = DataConfig(root_dir=root, sources={"corpus": 1.0}, seq_len=4096, seed=1)
    tokenizer = build_tokenizer(TokenizerConfig())
    tracemalloc.start()
    kept = Dataset(config, tokenizer, 256)
    memory, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    del kept
    began = time.perf_counter()
    data = Dataset(config, tokenizer, 256)
    opened = time.perf_counter() - began
    pickled = pickle.dumps(data)
    began = time.perf_counter()
    pickle.loads(pickled)
    unpickled = time.perf_counter() - began
    began = time.perf_counter()
    for turn in range(20):
        data.plan.locate(np.arange(256) + 10**7 + 256 * turn)
    located = (time.perf_counter() - began) / 20
    return {
        "open_seconds": opened,
        "memory_bytes": memory,
        "pickle_bytes": len(pickled),
        "unpickle_seconds": unpickled,
        "locate_seconds": located,
    }


def open_data(options: Options) -> Dataset:
    o = options
    return open_source(o.source, o.root_dir, o.tokenizer, o.seq_len, o.batch)


def benchmark(chosen: list[str], options: Options) -> dict[str, Any]:
    parts: dict[str, Callable[[Options], dict[str, Any]]] = {"mixing": mixing, "scale": scale}
    return {name: parts[name](options) for name in parts if name in chosen}


if __name__ == "__main__":
    run_benchmark("order", Options, ["mixing", "scale"], benchmark, __doc__ or "")
