"""The global shuffle: documents to token shards in two passes that both run in parallel.

Each document gets a 64-bit key, a hash of (seed, text), and belongs to the validation split by
a hash of the text alone. A shard holds the documents of one range of keys, sorted by key. So the
token stream is a pure function of the seed and the set of documents: neither the order of files,
nor the number of tasks or shards, nor a restart changes it; and a document is held out or not
whatever the seed. Identical documents share a key: they end up side by side, in one split, where
they are counted and, if asked, dropped.

Pass 1, `tokenise`, reads a slice of the input and leaves runs: tokens sorted by key, `RUN_BYTES`
each. Pass 2, `write_shard`, reads its range of keys out of every run, merges, writes one shard.
Both are plain functions of picklable arguments; who calls them, and how many at once, is up to
`modular_lm.data.prepare` and its callers. What a task has finished is on record (`finished`).

Cost. Every token is written and read once between the passes. A shard task reads one piece of every
run, by index: pieces are of RUN_BYTES / MOST_PIECES = 64 KiB or more, however large the corpus, for
there are no more shards than MOST_PIECES. A shard that is larger than memory should hold is read in
several such pieces or, where they would get too small, cut into ranges by way of temporary files:
written and read once more. So the work is linear in the corpus. At 1.3 T tokens (5 TB of text,
tokens of 4 bytes): 9 400 slices of 512 MiB of text, 47 000 runs, of which the last of each slice
is a small one, 2 048 shards of 2.5 GB, each cut into 20 ranges, and 96 M pieces, of 64 KiB in the
main. A task holds RUN_BYTES (pass 1) or RANGE_BYTES (pass 2) of tokens; the driver a line per
slice, run and shard.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from modular_lm.data.documents import Document, Part, read_documents
from modular_lm.data.finished import has_size, record, recorded
from modular_lm.data.manifest import Problems, Settings, ShardInfo, TokenizerId
from modular_lm.data.runs import (
    KEYS,
    RECORD,
    Piece,
    Tokens,
    in_order,
    read_range,
    write_run,
)
from modular_lm.data.shards import ShardWriter, token_dtype
from modular_lm.files import full_disk_named, sync
from modular_lm.tokenizer import Tokenizer

RUN_BYTES = 128 << 20
RANGE_BYTES = 128 << 20
MOST_PIECES = 2048
_DOCUMENT_BYTES = 256  # what a document costs in memory beside its tokens


@dataclass(frozen=True)
class Recipe:
    """How documents become tokens, and the folder in which the source is built."""

    tokenizer: Tokenizer
    settings: Settings
    folder: Path

    @property
    def scratch(self) -> Path:
        """Where runs and the records of finished tasks lie."""
        return self.folder / "runs"

    @property
    def shards(self) -> Path:
        """The folder that becomes the source."""
        return self.folder / "shards"

    @property
    def dtype(self) -> np.dtype[Any]:
        return token_dtype(TokenizerId.of(self.tokenizer).dtype)


@dataclass(frozen=True)
class Run:
    """A run by its file name in the scratch folder, with its bytes."""

    file: str
    size: int


@dataclass(frozen=True)
class SliceTask:
    """Parts of the input to tokenise; `name` is a hash of all that decides the result."""

    name: str
    parts: tuple[Part, ...]

    @property
    def size(self) -> int:
        return sum(part.size for part in self.parts)


@dataclass(frozen=True)
class SliceResult:
    """What pass 1 made of a slice: its runs by split, and counts of what it found.

    documents, tokens, text_bytes: of all documents with a text, duplicates among them; size: the
    slice's bytes of text as they were estimated.
    """

    name: str
    runs: dict[str, list[Run]]
    documents: int
    tokens: int
    text_bytes: int
    problems: Problems
    size: int


@dataclass(frozen=True)
class ShardTask:
    """Shard `number` of `count` of a split; `name` is made of all that decides the result."""

    name: str
    split: str
    number: int
    count: int


@dataclass(frozen=True)
class ShardResult:
    """The shard, None if no document fell into its range, and the duplicates found there."""

    name: str
    shard: ShardInfo | None
    duplicates: int


def text_digest(data: bytes) -> bytes:
    """What stands for a text: of it, key and split are made."""
    return hashlib.sha256(data).digest()


def document_key(digest: bytes, seed: int) -> int:
    """The document's place in the order of the corpus: 64 bits."""
    return int.from_bytes(hashlib.sha256(digest + f":{seed}".encode()).digest()[:8], "little")


def is_validation(digest: bytes, fraction: float) -> bool:
    """Whether a document is held out: a property of its text alone."""
    return int.from_bytes(digest[:8], "little") < fraction * KEYS


# ------------------------------------------------------------------ pass 1


def tokenise(recipe: Recipe, task: SliceTask) -> SliceResult:
    """Read a slice, tokenise it, and leave its documents as sorted runs in `recipe.scratch`.

    Raises DataError for input that cannot be read, RunFailedError on a full disk.
    """
    builders = {split: _RunBuilder(recipe, f"{task.name}-{split}") for split in ("train", "val")}
    counts = dict.fromkeys((f.name for f in fields(Problems)), 0)
    with full_disk_named(recipe.scratch):
        for part in task.parts:
            for document in read_documents(part):
                _tokenise_document(recipe, document, builders, counts)
                if sum(b.memory for b in builders.values()) >= RUN_BYTES:
                    max(builders.values(), key=lambda b: b.memory).flush()
        for builder in builders.values():
            builder.flush()
        result = SliceResult(
            task.name,
            {split: builder.runs for split, builder in builders.items()},
            sum(b.documents for b in builders.values()),
            sum(b.tokens for b in builders.values()),
            sum(b.text_bytes for b in builders.values()),
            Problems(**counts),
            task.size,
        )
        record(recipe.scratch, task.name, asdict(result))
    return result


def _tokenise_document(
    recipe: Recipe,
    document: Document | None,
    builders: dict[str, _RunBuilder],
    problems: dict[str, int],
) -> None:
    if document is None:
        problems["missing"] += 1
        return
    settings, (text, data, repaired) = recipe.settings, document
    problems["invalid_utf8"] += repaired
    problems["nul"] += b"\0" in data
    tokens = recipe.tokenizer.encode_array(
        data, recipe.dtype, add_bos=settings.add_bos, add_eos=settings.add_eos
    )
    if not text or text.isspace() or not len(tokens):
        problems["empty"] += 1
        return
    digest = text_digest(data)
    split = "val" if is_validation(digest, settings.val_fraction) else "train"
    builders[split].add(document_key(digest, settings.seed), len(data), tokens)


def finished_slice(recipe: Recipe, task: SliceTask) -> SliceResult | None:
    """The result of a slice if it is on record and its runs are there."""
    values = recorded(recipe.scratch, task.name)
    if values is None:
        return None
    try:
        values["runs"] = {s: [Run(**run) for run in runs] for s, runs in values["runs"].items()}
        values["problems"] = Problems(**values["problems"])
        result = SliceResult(**values)
    except (KeyError, TypeError, AttributeError):
        return None
    runs = (run for runs in result.runs.values() for run in runs)
    return result if all(has_size(recipe.scratch / r.file, r.size) for r in runs) else None


class _RunBuilder:
    """Collects documents of a split and writes them as runs; counts them."""

    def __init__(self, recipe: Recipe, name: str) -> None:
        self._scratch, self._name = recipe.scratch, name
        self.runs: list[Run] = []
        self.documents = self.tokens = self.text_bytes = 0
        self._clear()

    def _clear(self) -> None:
        self._records: list[tuple[int, int, int, int]] = []
        self._documents: list[Tokens] = []
        self.memory = 0

    def add(self, key: int, text_bytes: int, tokens: Tokens) -> None:
        self._records.append((key, text_bytes, len(tokens), 1))
        self._documents.append(tokens)
        self.documents += 1
        self.tokens += len(tokens)
        self.text_bytes += text_bytes
        self.memory += tokens.nbytes + _DOCUMENT_BYTES

    def flush(self) -> None:
        if not self._records:
            return
        records = np.array(self._records, RECORD)
        distinct = list(in_order(records, self._documents.__getitem__))
        records = records[[number for number, _ in distinct]]
        records["copies"] = [copies for _, copies in distinct]
        file = f"{self._name}-{len(self.runs):04d}.run"
        documents = [self._documents[number] for number, _ in distinct]
        self.runs.append(Run(file, write_run(self._scratch / file, records, documents)))
        self._clear()


# ------------------------------------------------------------------ pass 2


def write_shard(recipe: Recipe, runs: dict[str, list[Run]], task: ShardTask) -> ShardResult:
    """Merge one range of keys out of all `runs` (by split) into a shard.

    Raises DataError for a run that is damaged, RunFailedError on a full disk.
    """
    low, high = (-(-KEYS * i // task.count) for i in (task.number, task.number + 1))
    with full_disk_named(recipe.folder), tempfile.TemporaryDirectory(dir=recipe.scratch) as spare:
        ranges = _ranges(recipe, runs[task.split], (low, high), task.count, Path(spare))
        documents = (document for pieces in ranges for document in _merged(pieces))
        first = next(documents, None)
        result = ShardResult(task.name, None, 0)
        if first is not None:
            # Unlike the folder of the source, this one is no other process's.
            file = Path(spare) / f"{task.split}-{task.number:05d}.parquet"
            result = _write(recipe, task, file, chain([first], documents))
            file.rename(recipe.shards / file.name)
            sync(recipe.shards)
        record(recipe.scratch, task.name, asdict(result))
    return result


def _write(
    recipe: Recipe, task: ShardTask, file: Path, documents: Iterator[tuple[Tokens, int, int]]
) -> ShardResult:
    duplicates = 0
    with ShardWriter(file, task.split, TokenizerId.of(recipe.tokenizer)) as writer:
        for tokens, text_bytes, copies in documents:
            duplicates += copies - 1
            for _ in range(1 if recipe.settings.dedup else copies):
                writer.add(tokens, text_bytes)
    return ShardResult(task.name, writer.info, duplicates)


def finished_shard(recipe: Recipe, task: ShardTask) -> ShardResult | None:
    """The result of a shard task if it is on record and its shard is there."""
    values = recorded(recipe.scratch, task.name)
    if values is None:
        return None
    try:
        shard = values["shard"] and ShardInfo(**values["shard"])
        result = ShardResult(values["name"], shard, values["duplicates"])
    except (KeyError, TypeError):
        return None
    return result if shard is None or has_size(recipe.shards / shard.file, shard.size) else None


def _ranges(
    recipe: Recipe, runs: Sequence[Run], keys: tuple[int, int], shards: int, spare: Path
) -> Iterator[list[Piece]]:
    """The documents of the shard of these keys, as pieces of one range of keys after the other.

    Each range has some RANGE_BYTES at most. As long as its pieces are not too small it is read from
    the runs, else by way of files in `spare`.
    """
    expected = sum(run.size for run in runs) // shards
    ranges = -(-expected // RANGE_BYTES) or 1
    reads = min(ranges, max(1, MOST_PIECES // shards))
    for low, high in _cut(keys, reads):
        pieces = (read_range(recipe.scratch / r.file, recipe.dtype, low, high) for r in runs)
        if reads == ranges:
            yield list(pieces)
        else:
            yield from _spilled(pieces, (low, high), -(-ranges // reads), recipe.dtype, spare)


def _spilled(
    pieces: Iterator[Piece],
    keys: tuple[int, int],
    parts: int,
    dtype: np.dtype[Any],
    spare: Path,
) -> Iterator[list[Piece]]:
    """Sort pieces into `parts` smaller ranges of keys on disk, and give one range after another."""
    files = [(spare / f"{part}.records", spare / f"{part}.tokens") for part in range(parts)]
    inner = np.array([low for low, _ in _cut(keys, parts)][1:], np.uint64)
    with ExitStack() as stack:
        streams = [[stack.enter_context(f.open("wb", 1 << 18)) for f in pair] for pair in files]
        for piece in pieces:
            borders = [0, *np.searchsorted(piece.records["key"], inner), len(piece.records)]
            starts = piece.starts[borders]
            for part, (to_records, to_tokens) in enumerate(streams):
                to_records.write(piece.records[borders[part] : borders[part + 1]].data)
                to_tokens.write(piece.tokens[starts[part] : starts[part + 1]].data)
    for records, tokens in files:
        yield [Piece(np.fromfile(records, RECORD), np.fromfile(tokens, dtype))]
        records.unlink()
        tokens.unlink()


def _cut(keys: tuple[int, int], parts: int) -> list[tuple[int, int]]:
    low, high = keys
    borders = [low + (high - low) * i // parts for i in range(parts + 1)]
    return list(pairwise(borders))


def _merged(pieces: list[Piece]) -> Iterator[tuple[Tokens, int, int]]:
    """The distinct documents of all pieces by key: (tokens, text_bytes, copies)."""
    records = np.concatenate([p.records for p in pieces] or [np.empty(0, RECORD)])
    piece = np.repeat(np.arange(len(pieces)), [len(p.records) for p in pieces])
    starts = np.concatenate([p.starts[:-1] for p in pieces] or [np.empty(0, np.int64)])

    def document(i: int) -> Tokens:
        start = starts[i]
        return pieces[piece[i]].tokens[start : start + records["tokens"][i]]

    for i, copies in in_order(records, document):
        yield document(i), int(records["text_bytes"][i]), copies
