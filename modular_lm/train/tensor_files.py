"""Tensors in the files of torch.distributed.checkpoint (DCP), on a disk or in an object store.

What is written is hashed on its way, so that a checksum costs no second reading. DCP's own writer
for fsspec is not used: it calls os.sync for every file and reports a store's errors as they come.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import warnings
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import IO, Any

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemBase
from torch.distributed.checkpoint.metadata import StorageMeta

from modular_lm.storage import Place, RemotePath


def write_tensors(folder: Place, state: dict[str, Any], group: Any = None) -> dict[str, Any]:
    """Write `state` into an existing folder. A collective of `group`; without one, of one process.

    Returns {file: {"bytes", "sha256"}} of the files that this rank wrote. In one process raises
    what happened, in a group CheckpointException.
    """
    files = _Files()
    writer = _Writer(folder, files)
    if group is None:
        with without_group():
            dcp.save(state, storage_writer=writer, no_dist=True)
    else:
        dcp.save(state, storage_writer=writer, process_group=group)
    return files.written


def read_tensors(folder: Place, state: dict[str, Any], group: Any = None) -> None:
    """Fill the tensors of `state` in place. A collective of `group`; without one, of one process.

    Raises as `write_tensors`.
    """
    reader = _Reader(folder)
    if group is None:
        with without_group():
            dcp.load(state, storage_reader=reader, no_dist=True)
    else:
        dcp.load(state, storage_reader=reader, process_group=group)


def read_index(folder: Place) -> dict[str, Any]:
    """Name -> description of all that a checkpoint's files hold; reads none of it."""
    return _Reader(folder).read_metadata().state_dict_metadata


@contextlib.contextmanager
def without_group() -> Iterator[None]:
    """For torch.distributed.checkpoint in one process: its failures are raised as they happened."""
    with warnings.catch_warnings():
        # That there is no process group is meant.
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        try:
            yield
        except CheckpointException as error:
            cause, _ = next(iter(error.failures.values()))
            # Its own cause stays in sight: it may be a full disk.
            raise cause from (cause.__cause__ or cause.__context__ or error)


class _Files(FileSystemBase):
    """DCP's file operations on a place. written: size and SHA-256 of each file, by name."""

    def __init__(self) -> None:
        self.written: dict[str, dict[str, Any]] = {}

    @contextlib.contextmanager
    def create_stream(self, path: Any, mode: str) -> Generator[Any, None, None]:
        reaching = path.reaching() if isinstance(path, RemotePath) else contextlib.nullcontext()
        with reaching, path.open(mode) as stream:
            if mode == "rb":
                yield stream
                return
            hashed = _Hashed(stream)
            try:
                yield hashed
            except Exception:
                if hashed.error is None:
                    raise
                # PyTorch's writer of archives says only that bytes are missing.
                raise hashed.error from None
            self.written[path.name] = hashed.entry()

    def concat_path(self, path: Any, suffix: str) -> Any:
        return path / suffix

    def init_path(self, path: Any) -> Any:
        return path

    def rename(self, path: Any, new_path: Any) -> None:
        path.rename(new_path)
        self.written[new_path.name] = self.written.pop(path.name)

    def mkdir(self, path: Any) -> None:
        path.mkdir(parents=True, exist_ok=True)

    def exists(self, path: Any) -> bool:
        return path.is_file()

    def rm_file(self, path: Any) -> None:
        path.unlink()

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return isinstance(checkpoint_id, Path | RemotePath)


class _Hashed:
    """A stream that is written from beginning to end, and hashed meanwhile.

    error: why it could not be written.
    """

    def __init__(self, stream: IO[bytes]) -> None:
        self.error: OSError | None = None
        self._stream = stream
        self._digest = hashlib.sha256()
        self._bytes = 0

    def write(self, data: Any) -> int:
        self._digest.update(data)
        self._bytes += len(data)
        try:
            self._stream.write(data)
        except OSError as error:
            self.error = error
            raise
        return len(data)

    def tell(self) -> int:
        return self._bytes

    def flush(self) -> None:
        self._stream.flush()

    def fileno(self) -> int:
        # Whoever asks is about to fsync it; DCP does so to `.metadata` with its end in the buffer.
        self._stream.flush()
        return self._stream.fileno()

    def close(self) -> None:
        self._stream.close()

    def entry(self) -> dict[str, Any]:
        return {"bytes": self._bytes, "sha256": self._digest.hexdigest()}


class _Writer(FileSystemWriter):
    def __init__(self, folder: Place, files: _Files) -> None:
        # On a disk DCP waits until a file is on it; an object is there when its put has ended.
        super().__init__(os.fspath("."), sync_files=isinstance(folder, Path))
        self.fs, self.path = files, folder  # type: ignore[assignment]

    def storage_meta(self) -> StorageMeta:
        return StorageMeta(checkpoint_id=str(self.path), save_id=self.save_id)


class _Reader(FileSystemReader):
    def __init__(self, folder: Place) -> None:
        super().__init__(".")
        self.fs, self.path = _Files(), folder  # type: ignore[assignment]
