"""Samples and documents out of a prepared source.

Sample w of a source is its tokens [w * seq_len, (w + 1) * seq_len], the last one being a target
only: the stream is cut without regard to rows and shards, and a tail shorter than that is left
over. Which samples make up a step is `modular_lm.data.plan`'s business.

Nothing is cached here but open files: samples beside each other in the stream are read together,
whole rows at a time, each row is checked, and the operating system caches pages. Memory mapping was
left out on purpose: a file that another program cuts short would then kill the process by SIGBUS
instead of raising an error.
"""

from __future__ import annotations

import difflib
import threading
import weakref
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from modular_lm.data.manifest import FILE, Manifest
from modular_lm.data.shards import ShardFile, token_dtype
from modular_lm.errors import ConfigError, DataError
from modular_lm.tokenizer import Tokenizer

# Open shards of all readers of a process. A window of the plan's order touches up to 256 at a time
# in each source, and 1024 files are what a process may commonly have open.
_MAX_OPEN = 512
# Samples are read together up to so many rows, which stay in a core's cache until they are copied.
_RUN_ROWS = 128

Int64s = npt.NDArray[np.int64]


class SourceReader:
    """Reads one split of a source; can be pickled. Not for use by several threads at once.

    Raises DataError for a folder that is no source; when unpickled, for one that holds other tokens
    by then; when a shard is first touched, for a shard that does not fit its manifest; and, with
    every reading, for rows that differ from what was written.

    Unpickling is cheap: a thread keeps the readers it unpickled, with their files open, and gives
    them again while the source's manifest stays the same file.
    """

    _all: weakref.WeakSet[SourceReader] = weakref.WeakSet()

    def __init__(self, folder: Path, split: str = "train") -> None:
        self.folder, self._split_name = Path(folder), split
        self.manifest = Manifest.load(self.folder)
        self._split = self.manifest.split(split)
        self._dtype = token_dtype(self.manifest.dtype)
        self._row_bytes = self.manifest.row_tokens * self._dtype.itemsize
        self._ends = np.cumsum([s.tokens for s in self._split.shards], dtype=np.int64)
        self._bounds = [0, *self._ends.tolist()]
        self._shards: dict[int, ShardFile] = {}
        self._open: OrderedDict[int, None] = OrderedDict()
        self._scratch = memoryview(b"")
        self._all.add(self)

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, (self.folder, self._split_name, self.manifest.fingerprint)

    @property
    def n_tokens(self) -> int:
        return self._split.tokens

    @property
    def n_documents(self) -> int:
        return self._split.documents

    def n_windows(self, seq_len: int) -> int:
        """How many samples of `seq_len` inputs and targets the split holds."""
        return max(0, (self.n_tokens - 1) // seq_len)

    def windows(self, positions: Int64s, seq_len: int) -> npt.NDArray[np.integer[Any]]:
        """The samples at `positions` [n] -> tokens [n, seq_len + 1], of the manifest's dtype."""
        positions = np.asarray(positions, np.int64)
        out = np.empty((len(positions), seq_len + 1), self._dtype)
        if not len(positions):
            return out
        # In the order of the stream, so that neighbours are read together and shards forwards.
        order = np.argsort(positions, kind="stable")
        ordered = positions[order]
        n_windows = self.n_windows(seq_len)
        if ordered[0] < 0 or ordered[-1] >= n_windows:
            raise IndexError(f"{self.folder}: positions outside of 0..{n_windows - 1}")
        starts = ordered * seq_len
        shards = np.searchsorted(self._ends, starts, side="right")
        data, width = _raw(out), (seq_len + 1) * self._dtype.itemsize
        samples = zip(order.tolist(), starts.tolist(), shards.tolist(), strict=True)
        for shard, first, after, members in self._runs(samples, data, width):
            rows = self._buffer((after - first) * self._row_bytes)
            self._shard(shard).read_rows(first, rows)
            for to, at in members:
                data[to : to + width] = rows[at : at + width]
        return out

    def _runs(
        self, samples: Iterable[tuple[int, int, int]], out: memoryview, width: int
    ) -> Iterator[tuple[int, int, int, list[tuple[int, int]]]]:
        """Join neighbours among `samples` of `width` bytes, that each run of rows is read once.

        samples: place in `out`, position in the split and shard of each, in the order of the
        stream. Yields (shard, first row, row behind the last, [(offset in `out`, offset in these
        rows)]), in bytes. Samples that end in another shard are read here.
        """
        item, row_bytes, bounds = self._dtype.itemsize, self._row_bytes, self._bounds
        shard = first = after = -1
        members: list[tuple[int, int]] = []
        for place, start, there in samples:
            to, at = place * width, (start - bounds[there]) * item
            if start * item + width > bounds[there + 1] * item:
                self._read_across(there, start, out[to : to + width])
                continue
            row = at // row_bytes
            if there != shard or row > after or row - first >= _RUN_ROWS:
                if members:
                    yield shard, first, after, members
                shard, first, members = there, row, []
            after = -(-(at + width) // row_bytes)
            members.append((to, at - first * row_bytes))
        if members:
            yield shard, first, after, members

    def _buffer(self, size: int) -> memoryview:
        if len(self._scratch) < size:
            self._scratch = np.empty(size, np.uint8).data
        return self._scratch[:size]

    def documents(self, max_docs: int | None = None) -> Iterator[npt.NDArray[np.integer[Any]]]:
        """Whole documents in the order of the stream, the first `max_docs` or all: [n] tokens."""
        left = self.n_documents if max_docs is None else min(max_docs, self.n_documents)
        for number, shard in enumerate(self._split.shards):
            for start, stop in _documents(self._shard(number), shard.tokens):
                if left <= 0:
                    return
                left -= 1
                out = np.empty(stop - start, self._dtype)
                self._shard(number).read_into(start, _raw(out))
                yield out

    def verify(self) -> None:
        """Read every shard of the split and compare with its sha256. Raises DataError."""
        for number in range(len(self._split.shards)):
            self._shard(number).verify()

    def _read_across(self, shard: int, start: int, out: memoryview) -> None:
        """Fill `out` with the tokens from position `start` of the split, which lies in `shard`."""
        done, item = 0, self._dtype.itemsize
        while done < len(out):
            first, end = self._bounds[shard], self._bounds[shard + 1]
            position = start + done // item
            n = min(len(out) - done, (end - position) * item)
            self._shard(shard).read_into(position - first, out[done : done + n])
            done += n
            shard += 1

    def _shard(self, number: int) -> ShardFile:
        """The shard, opened; the least recently used one is closed when too many are open."""
        if number in self._open:
            self._open.move_to_end(number)
            return self._shards[number]
        while self._open and len(self._open) >= _MAX_OPEN // len(self._all):
            self._shards[self._open.popitem(last=False)[0]].close()
        if number not in self._shards:
            info = self._split.shards[number]
            shard = ShardFile(self.folder, self.manifest, self._split_name, info)
            self._shards[number] = shard
        self._open[number] = None
        return self._shards[number]


class _Unpickled(threading.local):
    """The readers that a thread unpickled, and of which manifest file each was made."""

    def __init__(self) -> None:
        self.readers: dict[tuple[Path, str], tuple[tuple[int, ...], SourceReader]] = {}


_unpickled = _Unpickled()


def _reopen(folder: Path, split: str, fingerprint: str) -> SourceReader:
    """The reader that was pickled. Raises DataError if the source holds other tokens now."""
    made_of = _identity(folder / FILE)
    known, reader = _unpickled.readers.get((folder, split), (None, None))
    if reader is None or known != made_of:
        reader = SourceReader(folder, split)
        _unpickled.readers[folder, split] = made_of, reader
    if reader.manifest.fingerprint != fingerprint:
        raise DataError(
            f"{folder}: has been prepared again since this run began, and holds other tokens now; "
            "restore it, or use another dump_dir for a new run"
        )
    return reader


def _identity(file: Path) -> tuple[int, ...]:
    """What tells that a file was replaced or rewritten, for the price of a stat; () for none."""
    try:
        found = file.stat()
    except FileNotFoundError:
        return ()
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _documents(shard: ShardFile, n_tokens: int) -> Iterator[tuple[int, int]]:
    """(start, stop) of each document of a shard."""
    last = None
    for starts in shard.document_starts():
        for start in starts.tolist():
            if last is not None:
                yield last, start
            last = start
    if last is not None:
        yield last, n_tokens


def _raw(tokens: npt.NDArray[np.integer[Any]]) -> memoryview:
    """The bytes of a contiguous array, to be written to."""
    return tokens.reshape(-1).view(np.uint8).data


def open_sources(
    root_dir: str | Path | None, names: list[str], tokenizer: Tokenizer
) -> dict[str, Path]:
    """The folders of the sources `names` below `root_dir`, checked; reads manifests only.

    Raises ConfigError for a folder or source that is not there, or a `root_dir` of which no source
    is asked for; DataError for one that is not whole or was made with another tokenizer than
    `tokenizer`.
    """
    if not names:
        if root_dir is None:
            return {}
        raise ConfigError(
            f"data.root_dir={root_dir}: data.sources names nothing there, only the built-in "
            "corpus; say data.sources={NAME: 1}, or leave data.root_dir out"
        )
    if root_dir is None:
        raise ConfigError(f"data.root_dir=null: data.sources.{names[0]} needs the folder it is in")
    root = Path(root_dir).expanduser()
    if not root.is_dir():
        raise ConfigError(
            f"data.root_dir={root_dir}: no such folder; prepare it with "
            f"python -m ray_jobs.prepare src=TEXT dst={root_dir}"
        )
    return {name: _open_source(root, name, tokenizer) for name in names}


def _open_source(root: Path, name: str, tokenizer: Tokenizer) -> Path:
    folder = root / name
    if not folder.is_dir():
        there = sorted(d.name for d in root.iterdir() if (d / FILE).is_file())
        close = difflib.get_close_matches(name, there, n=1)
        hint = f"did you mean {close[0]}?" if close else f"there are: {', '.join(there) or 'none'}"
        raise ConfigError(f"data.sources.{name}: no such source in data.root_dir={root}; {hint}")
    manifest = Manifest.load(folder)
    manifest.check_sizes(folder)
    made_by = manifest.tokenizer
    if made_by.content_hash != tokenizer.content_hash:
        raise DataError(
            f"data.sources.{name}: {folder} was prepared with another tokenizer "
            f"({made_by.name}, {made_by.n_words} tokens, {made_by.content_hash[:12]}) than "
            f"data.tokenizer ({tokenizer.name}, {tokenizer.n_words} tokens, "
            f"{tokenizer.content_hash[:12]})"
        )
    return folder
