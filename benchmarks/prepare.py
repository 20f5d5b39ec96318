"""Prepare: its speed per core against a bare loop of the tokenizer, its memory, its shuffle.

    python -m benchmarks.prepare [mode ...] [data=FOLDER rounds=2 copies=5 tokenizers=[bytes,...]]

`data` holds `text/SOURCE/*.parquet` and `tokenizers/{llama2,llama3}/tokenizer.model`. All files of
`text` are one source here.

- speed: MB of text per second and core, and per processor second, of (a) a loop of `encode` over
  texts in memory, in one process and in two at once, (b) the whole prepare in one process, (c) on
  Ray with 2 CPUs; and the slopes by which a larger corpus can be reckoned: seconds of each pass,
  bytes on disk.
- memory: peak of the job on Ray above that of the idle Ray, for the corpus and for `copies` of it
  whose documents differ.
- shuffle: the two passes against Ray Data's `random_shuffle` and `sort` on the same documents.

Times of a shared machine mean little; the ratios are the result.
"""

from __future__ import annotations

import functools
import multiprocessing
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks._memory import PeakMemory, cpu_seconds, memory
from benchmarks._runs import print_table, run_benchmark
from modular_lm.config.schema import PrepareConfig, TokenizerConfig, key
from modular_lm.data.manifest import Manifest
from modular_lm.data.prepare import MapTasks, plan_sources, run_plans, serial
from modular_lm.data.shuffle import SliceResult, document_key, text_digest
from modular_lm.errors import ConfigError
from modular_lm.tokenizer import build_tokenizer
from ray_jobs._session import ray_session
from ray_jobs.prepare import on_ray

MODES = ("speed", "memory", "shuffle")
CORES = 2
# What is timed, and the bare loop it is compared with.
HOW = {"bare": "bare", "bare x 2": "bare", "serial": "bare", "ray": "bare x 2"}
IDLE_SECONDS = 5.0
MB, MIB = 1e6, 1 << 20


@dataclass
class Options:
    data: str = key("../shared/data", "folder with text/ and tokenizers/")
    tokenizers: list[str] = key(["bytes", "llama2", "llama3"], "bytes, llama2, llama3")
    sources: list[str] = key([], "folders of text/ to take; default: all")
    rounds: int = key(2, "how often each takes its turn (speed)", ge=1)
    copies: int = key(5, "how often the corpus is repeated (memory, shuffle)", ge=2)


def tokenizer_config(options: Options, name: str) -> TokenizerConfig:
    """The tokenizer of that name."""
    if name == "bytes":
        return TokenizerConfig()
    path = str(Path(options.data) / "tokenizers" / name / "tokenizer.model")
    if name == "llama2":
        return TokenizerConfig("sp", path)
    if name == "llama3":
        return TokenizerConfig("tiktoken", path)
    raise ConfigError(f"tokenizers={name}: expected bytes, llama2 or llama3")


# ------------------------------------------------------------------ corpora


def link_corpus(options: Options, folder: Path) -> Path:
    """All files as those of one source."""
    root = (Path(options.data) / "text").resolve()
    names = options.sources or sorted(p.name for p in root.iterdir() if p.is_dir())
    files = [file for name in names for file in sorted((root / name).glob("*.parquet"))]
    if not files:
        raise ConfigError(f"data={options.data}: no parquet files in text/SOURCE/")
    folder.mkdir()
    for file in files:
        (folder / f"{file.parent.name}-{file.name}").symlink_to(file)
    return folder


def read_corpus(folder: Path) -> list[str]:
    """All texts."""
    return [t for f in sorted(folder.iterdir()) for t in _column(f).to_pylist()]


def repeat_corpus(corpus: Path, folder: Path, copies: int) -> Path:
    """`copies` of each file, whose documents begin with the number of the copy."""
    folder.mkdir()
    for file in sorted(corpus.iterdir()):
        texts = _column(file).to_pylist()
        for copy in range(copies):
            table = pa.table({"text": [f"copy {copy}\n{text}" for text in texts]})
            target = folder / f"{copy}-{file.name}"
            pq.write_table(table, target, compression="zstd", row_group_size=1000)
    return folder


def _column(file: Path) -> pa.ChunkedArray:
    return pq.read_table(file, columns=["text"])["text"]


# ------------------------------------------------------------------ speed


class Clock(NamedTuple):
    """Seconds that something took, and processor seconds of all processes that did it."""

    wall: float
    cpu: float


def bare_loop(config: TokenizerConfig, texts: Sequence[str]) -> Clock:
    """Encode all texts, one after the other."""
    encode = build_tokenizer(config).encode
    start, cpu = time.perf_counter(), time.process_time()
    for text in texts:
        encode(text, add_bos=True, add_eos=True)
    return Clock(time.perf_counter() - start, time.process_time() - cpu)


def bare_loops(config: TokenizerConfig, corpus: Path) -> Clock:
    """Means of `bare_loop` in each of CORES processes at once."""
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(CORES), context.Queue()
    arguments = (config, corpus, barrier, results)
    processes = [
        context.Process(target=_one_of_many, args=arguments, daemon=True) for _ in range(CORES)
    ]
    for process in processes:
        process.start()
    clocks = [results.get(timeout=900) for _ in processes]
    for process in processes:
        process.join()
    return Clock(*(statistics.mean(values) for values in zip(*clocks, strict=True)))


def _one_of_many(config: TokenizerConfig, corpus: Path, barrier: Any, results: Any) -> None:
    texts = read_corpus(corpus)
    build_tokenizer(config)
    barrier.wait()
    results.put(tuple(bare_loop(config, texts)))


@dataclass
class Timed:
    """A `MapTasks` that keeps the seconds of each pass and the bytes of the runs."""

    map_tasks: MapTasks
    seconds: list[float] = field(default_factory=list)
    run_bytes: int = 0

    def __call__(self, function: Callable[[Any], Any], tasks: Sequence[Any]) -> Iterable[Any]:
        start = time.perf_counter()
        for result in self.map_tasks(function, tasks):
            if isinstance(result, SliceResult):
                self.run_bytes += sum(r.size for runs in result.runs.values() for r in runs)
            yield result
        self.seconds.append(time.perf_counter() - start)


@dataclass(frozen=True)
class Prepared:
    manifest: Manifest
    clock: Clock
    passes: tuple[float, float]
    run_bytes: int


def prepare(src: Path, dst: Path, config: TokenizerConfig, map_tasks: MapTasks) -> Prepared:
    """Prepare the source `src` into `dst`, which is emptied first, with the clocks running."""
    shutil.rmtree(dst, ignore_errors=True)
    timed = Timed(map_tasks)
    # Loads the tokenizer, which the bare loop does not count either.
    plans = plan_sources(PrepareConfig(str(src), str(dst), config))
    start, cpu = time.perf_counter(), cpu_seconds()
    (manifest,) = run_plans(plans, timed)
    clock = Clock(time.perf_counter() - start, cpu_seconds() - cpu)
    return Prepared(manifest, clock, (timed.seconds[0], timed.seconds[1]), timed.run_bytes)


@contextmanager
def warm_ray(config: TokenizerConfig) -> Iterator[None]:
    """A Ray of CORES CPUs whose workers have imported what they need and loaded the tokenizer."""
    with ray_session(CORES):
        list(on_ray(functools.partial(_warm_up, config), range(4 * CORES)))
        yield


def _warm_up(config: TokenizerConfig, number: int) -> int:
    build_tokenizer(config)
    time.sleep(0.2)  # so that every worker gets one
    return number


def speed_of(name: str, options: Options, corpus: Path, scratch: Path) -> dict[str, Any]:
    """All measurements of one tokenizer, in turns; `clocks` by what ran."""
    config, texts = tokenizer_config(options, name), read_corpus(corpus)
    clocks: dict[str, list[Clock]] = {how: [] for how in HOW}
    made: dict[str, Prepared] = {}
    with warm_ray(config):
        for _ in range(options.rounds):
            clocks["bare"].append(bare_loop(config, texts))
            made["serial"] = prepare(corpus, scratch / "serial", config, serial)
            clocks["serial"].append(made["serial"].clock)
            clocks["bare x 2"].append(bare_loops(config, corpus))
            made["ray"] = prepare(corpus, scratch / "ray", config, on_ray)
            clocks["ray"].append(made["ray"].clock)
    assert made["ray"].manifest.fingerprint == made["serial"].manifest.fingerprint
    train, val = made["ray"].manifest.train, made["ray"].manifest.val
    tokens, stored = train.tokens + val.tokens, [*train.shards, *val.shards]
    text_bytes = train.text_bytes + val.text_bytes
    return {
        "tokenizer": name,
        "documents": len(texts),
        "text_bytes": text_bytes,
        "tokens": tokens,
        "clocks": {how: [c._asdict() for c in listed] for how, listed in clocks.items()},
        "pass_core_seconds_per_gb": {
            how: [s * (CORES if how == "ray" else 1) * 1e9 / text_bytes for s in done.passes]
            for how, done in made.items()
        },
        "disk_bytes_per_token": sum(s.size for s in stored) / tokens,
        "scratch_bytes_per_token": made["ray"].run_bytes / tokens,
    }


def speed(options: Options, corpus: Path, scratch: Path) -> list[dict[str, Any]]:
    """The table of speeds and that of slopes."""
    found = []

    def rows() -> Iterator[tuple[str, ...]]:
        for name in options.tokenizers:
            found.append(speed_of(name, options, corpus, scratch))
            yield from _speed_rows(found[-1])

    units = ("MB/s", "docs/s", "tokens/s", "/ bare", "MB/CPU-s", "/ bare")
    print_table(("per core", *units), rows())
    print()
    slopes = [
        (
            f"{r['tokenizer']} {how}",
            *(f"{s:.1f}" for s in r["pass_core_seconds_per_gb"][how]),
            f"{r['clocks'][how][-1]['cpu'] * 1e9 / r['text_bytes']:.1f}",
            f"{r['disk_bytes_per_token']:.3f}",
            f"{r['scratch_bytes_per_token']:.3f}",
        )
        for r in found
        for how in r["pass_core_seconds_per_gb"]
    ]
    units = ("pass 1", "pass 2", "CPU s", "disk B/token", "scratch B/token")
    print_table(("core-s per GB of text", *units), slopes)
    return found


def _speed_rows(result: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """Rates per core: by the clock, and by processor time, which other programs disturb less.

    Ray is compared with as many bare loops at once, for cores that share caches are slower.
    """
    clocks, size = result["clocks"], result["text_bytes"]
    for how, base in HOW.items():
        cores = CORES if how == "ray" else 1
        wall = statistics.median(c["wall"] * cores for c in clocks[how])
        cpu = statistics.median(c["cpu"] for c in clocks[how])
        ratios = [
            statistics.median(
                b[k] / (c[k] * (cores if k == "wall" else 1))
                for b, c in zip(clocks[base], clocks[how], strict=True)
            )
            for k in ("wall", "cpu")
        ]
        rates = (f"{result[k] / wall:,.0f}" for k in ("documents", "tokens"))
        yield (
            f"{result['tokenizer']} {how}",
            f"{size / wall / MB:.2f}",
            *rates,
            f"{ratios[0]:.2f}",
            f"{size / cpu / MB:.2f}",
            f"{ratios[1]:.2f}",
        )


# ------------------------------------------------------------------ memory


def peak_of(job: Callable[[], Any]) -> dict[str, float]:
    """Start a Ray as the job does, let it settle, run `job`: seconds, and peak above idle."""
    with ray_session():
        time.sleep(IDLE_SECONDS)  # nothing tells when a Ray is idle
        idle = memory()
        start = time.perf_counter()
        with PeakMemory() as watched:
            job()
        seconds = time.perf_counter() - start
    return {"seconds": seconds, "idle": idle, "above": watched.peak - idle}


def memory_of(options: Options, corpora: dict[str, Path], scratch: Path) -> list[dict[str, Any]]:
    """The table of peaks, per tokenizer and corpus."""
    found = []

    def rows() -> Iterator[tuple[str, ...]]:
        for name in options.tokenizers:
            config = tokenizer_config(options, name)
            for label, corpus in corpora.items():
                job = functools.partial(prepare, corpus, scratch / "memory", config, on_ray)
                found.append({"tokenizer": name, "corpus": label, **peak_of(job)})
                yield f"{name}, {label}", *_shown(found[-1])

    print_table(("prepare on Ray", "seconds", "idle MiB", "peak above idle MiB"), rows())
    return found


def _shown(result: dict[str, float]) -> tuple[str, str, str]:
    sizes = (f"{result[k] / MIB:,.0f}" for k in ("idle", "above"))
    return f"{result['seconds']:.1f}", *sizes  # type: ignore[return-value]


# ------------------------------------------------------------------ shuffle


def ray_data_shuffle(how: str, corpus: Path, dst: Path) -> None:
    """The same documents, as bytes, ordered by Ray Data and written as Parquet."""
    import ray.data

    shutil.rmtree(dst, ignore_errors=True)
    files = [str(file.resolve()) for file in corpus.iterdir()]
    documents = ray.data.read_parquet(files).select_columns(["text"])
    documents = documents.map_batches(_tokenised, batch_format="pyarrow", batch_size=256)
    shuffled = documents.sort("key") if how == "sort" else documents.random_shuffle(seed=42)
    shuffled.write_parquet(str(dst))


def _tokenised(batch: pa.Table) -> pa.Table:
    texts = [text.encode() for text in batch["text"].to_pylist()]
    keys = [document_key(text_digest(text), 42) - (1 << 63) for text in texts]
    tokens = [np.frombuffer(text, np.uint8).astype("<u2").tobytes() for text in texts]
    return pa.table({"key": pa.array(keys, pa.int64()), "tokens": pa.array(tokens, pa.binary())})


def shuffle(corpora: dict[str, Path], scratch: Path) -> list[dict[str, Any]]:
    """The table of time and memory of three ways to shuffle, the tokens being bytes."""
    found, config = [], TokenizerConfig()

    def rows() -> Iterator[tuple[str, ...]]:
        for label, corpus in corpora.items():
            ways: dict[str, Callable[[], Any]] = {
                "two passes": functools.partial(prepare, corpus, scratch / "two", config, on_ray)
            }
            for how in ("random_shuffle", "sort"):
                job = functools.partial(ray_data_shuffle, how, corpus, scratch / "ray-data")
                ways[f"Ray Data {how}"] = job
            for way, job in ways.items():
                found.append({"way": way, "corpus": label, **peak_of(job)})
                yield f"{way}, {label}", *_shown(found[-1])

    print_table(("shuffle", "seconds", "idle MiB", "peak above idle MiB"), rows())
    return found


def benchmark(chosen: list[str], options: Options) -> dict[str, Any]:
    """Run the chosen modes; returns their measurements by mode."""
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="mlm") as folder:
        scratch = Path(folder)
        corpora = {"corpus": link_corpus(options, scratch / "corpus")}
        if "speed" in chosen:
            result["speed"] = speed(options, corpora["corpus"], scratch)
        if set(chosen) & {"memory", "shuffle"}:
            copies = repeat_corpus(corpora["corpus"], scratch / "copies", options.copies)
            corpora[f"x {options.copies}"] = copies
        if "memory" in chosen:
            result["memory"] = memory_of(options, corpora, scratch)
        if "shuffle" in chosen:
            result["shuffle"] = shuffle(corpora, scratch)
    return result


if __name__ == "__main__":
    run_benchmark("prepare", Options, MODES, benchmark, __doc__ or "")
