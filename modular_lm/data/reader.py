"""Samples and documents out of a prepared source.

Sample w of a source is its tokens [w * seq_len, (w + 1) * seq_len], the last one being a target
only: the stream is cut without regard to rows and shards, and a tail shorter than that is left
over. Which samples make up a step is `modular_lm.data.plan`'s business.

Nothing is cached here but open files: a sample is one `preadv` per shard and row group it touches,
and the operating system caches pages. Memory mapping was left out on purpose: a file that another
program cuts short would then kill the process by SIGBUS instead of raising an error.
"""

from __future__ import annotations

import difflib
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from modular_lm.data.manifest import FILE, Manifest
from modular_lm.data.shards import ShardFile, token_dtype
from modular_lm.errors import ConfigError, DataError
from modular_lm.tokenizer import Tokenizer

_MAX_OPEN = 128


class SourceReader:
    """Reads one split of a source; can be pickled. Not for use by several threads at once.

    Raises DataError for a folder that is no source; when unpickled, for one that holds other tokens
    by then; and, when a shard is first touched, for a shard that does not fit its manifest.
    """

    def __init__(self, folder: Path, split: str = "train") -> None:
        self.folder, self._split_name = Path(folder), split
        self.manifest = Manifest.load(self.folder)
        self._split = self.manifest.split(split)
        self._dtype = token_dtype(self.manifest.dtype)
        self._ends = np.cumsum([s.tokens for s in self._split.shards], dtype=np.int64)
        self._bounds = [0, *self._ends.tolist()]
        self._open: OrderedDict[int, ShardFile] = OrderedDict()

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

    def windows(
        self, positions: npt.NDArray[np.int64], seq_len: int
    ) -> npt.NDArray[np.integer[Any]]:
        """The samples at `positions` [n] -> tokens [n, seq_len + 1], of the manifest's dtype."""
        positions = np.asarray(positions, np.int64)
        n_windows = self.n_windows(seq_len)
        if len(positions) and not (positions.min() >= 0 and positions.max() < n_windows):
            raise IndexError(f"{self.folder}: positions outside of 0..{n_windows - 1}")
        out = np.empty((len(positions), seq_len + 1), self._dtype)
        data, width = _raw(out), (seq_len + 1) * self._dtype.itemsize
        # In the order of the stream, so that each shard is opened once and read forwards.
        order = np.argsort(positions, kind="stable")
        starts = positions[order] * seq_len
        shards = np.searchsorted(self._ends, starts, side="right")
        for row, start, shard in zip(order.tolist(), starts.tolist(), shards.tolist(), strict=True):
            self._read(shard, start, data[row * width : (row + 1) * width])
        return out

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

    def _read(self, shard: int, start: int, out: memoryview) -> None:
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
        """The opened shard; the least recently used one is closed when too many are open."""
        shard = self._open.pop(number, None)
        if shard is None:
            info = self._split.shards[number]
            shard = ShardFile(self.folder, self.manifest, self._split_name, info)
            if len(self._open) >= _MAX_OPEN:
                self._open.popitem(last=False)[1].close()
        self._open[number] = shard
        return shard


def _reopen(folder: Path, split: str, fingerprint: str) -> SourceReader:
    """The reader that was pickled. Raises DataError if the source holds other tokens now."""
    reader = SourceReader(folder, split)
    if reader.manifest.fingerprint != fingerprint:
        raise DataError(
            f"{folder}: has been prepared again since this run began, and holds other tokens now; "
            "restore it, or use another dump_dir for a new run"
        )
    return reader


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

    Raises ConfigError for a folder or source that is not there, DataError for one that is not whole
    or was made with another tokenizer than `tokenizer`.
    """
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
