"""The global shuffle: documents to token shards in two passes that both run in parallel.

Each document gets a 64-bit key, a hash of (seed, text), and belongs to the validation split by
another hash, of the text alone. A shard holds the documents of one range of keys, sorted by key.
So the token stream is a pure function of the seed and the set of documents: neither the order of
files, nor the number of tasks or shards, nor a restart changes it; and a document is held out or
not whatever the seed. (Exact duplicates share a key: they end up side by side, in one split.)

Pass 1, `tokenise`, reads a slice of a file and leaves runs: tokens sorted by key. Pass 2,
`write_shard`, takes its range out of every run by binary search, merges, and writes one shard. A
task of pass 1 holds at most one run in memory, a task of pass 2 the keys of one shard.
Both are plain functions of picklable arguments; who calls them, and how many at once, is up to
`modular_lm.data.prepare` and its callers. A task that is run twice writes the same files again.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from modular_lm.data.documents import Slice, read_texts
from modular_lm.data.manifest import Settings, ShardInfo, TokenizerId
from modular_lm.data.shards import ShardWriter, token_dtype
from modular_lm.tokenizer import Tokenizer

RUN_BYTES = 128 << 20
_DOCUMENT_BYTES = 256  # what a document costs in memory beside its tokens


@dataclass(frozen=True)
class Recipe:
    """How documents become tokens, and the folder in which the source is built."""

    tokenizer: Tokenizer
    settings: Settings
    folder: Path

    @property
    def scratch(self) -> Path:
        """Where the runs between the passes lie."""
        return self.folder / "runs"


@dataclass(frozen=True)
class SliceTask:
    number: int
    part: Slice


@dataclass(frozen=True)
class SliceResult:
    """What pass 1 made of a slice; `runs` are the names of its files, by split."""

    number: int
    runs: dict[str, list[str]]
    documents: int
    skipped: int
    tokens: int
    text_bytes: int
    size: int


@dataclass(frozen=True)
class ShardTask:
    """Shard `number` of `count` of a split."""

    split: str
    number: int
    count: int


def document_key(text: bytes, seed: int) -> int:
    """The document's place in the order of the corpus: 64 bits."""
    digest = hashlib.blake2b(f"{seed}:".encode(), digest_size=8)
    digest.update(text)
    return int.from_bytes(digest.digest(), "little")


def is_validation(text: bytes, fraction: float) -> bool:
    """Whether a document is held out: a property of its text alone."""
    digest = hashlib.blake2b(text, digest_size=8, person=b"validation").digest()
    return int.from_bytes(digest, "little") < fraction * 2**64


# ------------------------------------------------------------------ pass 1


def tokenise(recipe: Recipe, task: SliceTask) -> SliceResult:
    """Read a slice, tokenise it, and leave its documents as sorted runs in `recipe.scratch`.

    Raises DataError for input that cannot be read.
    """
    settings = recipe.settings
    builders = {
        split: _RunBuilder(recipe, f"{task.number:06d}-{split}") for split in ("train", "val")
    }
    skipped = 0
    for text in read_texts(task.part):
        data = text.encode()
        ids = recipe.tokenizer.encode(text, add_bos=settings.add_bos, add_eos=settings.add_eos)
        if not text.strip() or not ids:
            skipped += 1
            continue
        split = "val" if is_validation(data, settings.val_fraction) else "train"
        builders[split].add(document_key(data, settings.seed), ids, len(data))
    for builder in builders.values():
        builder.flush()
    return SliceResult(
        task.number,
        {split: builder.runs for split, builder in builders.items()},
        sum(b.documents for b in builders.values()),
        skipped,
        sum(b.tokens for b in builders.values()),
        sum(b.text_bytes for b in builders.values()),
        task.part.size,
    )


class _RunBuilder:
    """Collects documents and writes them as runs, each a file sorted by key.

    A run is, in little-endian numbers: n, keys [n], ends [n] of the documents in tokens,
    text_bytes [n], and the tokens; `_RunRange` maps it.
    """

    def __init__(self, recipe: Recipe, name: str) -> None:
        self._scratch, self._name = recipe.scratch, name
        self._dtype = token_dtype(TokenizerId.of(recipe.tokenizer).dtype)
        self.runs: list[str] = []
        self.documents = self.tokens = self.text_bytes = 0
        self._clear()

    def _clear(self) -> None:
        self._keys: list[int] = []
        self._sizes: list[int] = []
        self._documents: list[npt.NDArray[np.integer]] = []
        self._memory = 0

    def add(self, key: int, ids: list[int], text_bytes: int) -> None:
        tokens = np.array(ids, self._dtype)
        self._keys.append(key)
        self._sizes.append(text_bytes)
        self._documents.append(tokens)
        self.documents += 1
        self.tokens += len(tokens)
        self.text_bytes += text_bytes
        self._memory += tokens.nbytes + _DOCUMENT_BYTES
        if self._memory >= RUN_BYTES:
            self.flush()

    def flush(self) -> None:
        if not self._keys:
            return
        keys = np.array(self._keys, "<u8")
        order = np.argsort(keys, kind="stable")
        documents = [self._documents[i] for i in order]
        ends = np.cumsum([len(d) for d in documents], dtype="<i8")
        sizes = np.array(self._sizes, "<i8")[order]
        run = f"{self._name}-{len(self.runs):04d}.run"
        partial = self._scratch / f"{run}.{os.getpid()}"
        with partial.open("wb") as stream:
            for values in (np.array([len(keys)], "<i8"), keys[order], ends, sizes, *documents):
                stream.write(values.data)
        os.replace(partial, self._scratch / run)
        self.runs.append(run)
        self._clear()


# ------------------------------------------------------------------ pass 2


class _RunRange:
    """The documents of a run with low <= key < high, mapped; `high` may be 2**64.

    keys, text_bytes: [n]; document i is tokens[bounds[i] : bounds[i + 1]].
    """

    def __init__(self, file: Path, dtype: np.dtype, low: int, high: int) -> None:
        data = np.memmap(file, np.uint8, mode="r")
        n = int(data[:8].view("<i8")[0])
        keys, ends, sizes = data[8 : 8 + 24 * n].view("<u8").reshape(3, n)
        first = int(np.searchsorted(keys, np.uint64(low)))
        stop = n if high >= 2**64 else int(np.searchsorted(keys, np.uint64(high)))
        before = ends[first - 1] if first else 0
        self.keys = np.array(keys[first:stop])
        self.text_bytes = sizes[first:stop].tolist()
        self.bounds = [int(before), *ends[first:stop].tolist()]
        self.tokens = data[8 + 24 * n :].view(dtype)


def write_shard(
    recipe: Recipe, runs: Mapping[str, Sequence[str]], task: ShardTask
) -> ShardInfo | None:
    """Merge one range of keys out of all `runs` (by split, in the order of the input) into a shard.

    Returns None if no document falls into the range.
    """
    tokenizer = TokenizerId.of(recipe.tokenizer)
    low, high = (-(-(2**64) * i // task.count) for i in (task.number, task.number + 1))
    ranges = [
        _RunRange(recipe.scratch / run, token_dtype(tokenizer.dtype), low, high)
        for run in runs[task.split]
    ]
    if not any(len(r.keys) for r in ranges):
        return None
    file = recipe.folder / f"{task.split}-{task.number:05d}.parquet"
    with ShardWriter(file, task.split, tokenizer) as writer:
        for run, i in _merged(ranges):
            writer.add(run.tokens[run.bounds[i] : run.bounds[i + 1]], run.text_bytes[i])
    return writer.info


def _merged(ranges: list[_RunRange]) -> Iterator[tuple[_RunRange, int]]:
    """The documents of all ranges by key; of equal keys, the earlier run's first."""
    keys = np.concatenate([r.keys for r in ranges])
    run = np.repeat(np.arange(len(ranges)), [len(r.keys) for r in ranges])
    index = np.concatenate([np.arange(len(r.keys)) for r in ranges])
    for at in np.argsort(keys, kind="stable"):
        yield ranges[run[at]], int(index[at])
