"""Files and folders that appear or change as a whole, and locks between processes.

What the files hold, and who may write them, is the business of their owners.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import shutil
import socket
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from modular_lm.errors import ConfigError, FullDiskError, RunFailedError, reason

log = logging.getLogger(__name__)

_FULL_DISK = (errno.ENOSPC, errno.EDQUOT)
# What file systems answer that have no locks, or whose lock service is not running.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


# ------------------------------------------------------------------ replacing


def write_text_atomic(path: Path, text: str) -> None:
    """Write a file so that readers, and a crash, find the old or the new text, never a part.

    Durable when it returns. Raises RunFailedError on a full disk.
    """
    with replacing(path) as file:
        file.write(text.encode("utf-8"))


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A new file that takes the place of `path` when the block ends; removed if the block fails.

    Raises RunFailedError on a full disk.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with full_disk_named(path):
            with open(temporary, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            sync(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def sync(path: Path) -> None:
    """Make what a file holds, or the names in a folder, durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def full_disk_named(path: Path) -> Iterator[None]:
    """Raise FullDiskError, naming `path`, where the block meets a full disk or a spent quota."""
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL_DISK:
            raise
        raise FullDiskError(
            f"{path}: {error.strerror}; free some space there, then run the same command again"
        ) from error


# ------------------------------------------------------------------ new folders


def check_new(path: Path, key: str) -> None:
    """Raise ConfigError, naming `key`, if anything but an empty folder is there."""
    if path.is_dir():
        if any(path.iterdir()):
            raise ConfigError(f"{key}={path}: is a folder with files in it; choose a new one")
    elif path.exists():
        raise ConfigError(f"{key}={path}: is a file already; choose a new path")


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A temporary folder that becomes `path`, durably, when the block ends; removed if it fails.

    `path` must not exist, or be an empty folder. Raises RunFailedError where it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with writing(path):
            temporary.mkdir(parents=True)
            yield temporary
            for file in temporary.iterdir():
                sync(file)
            sync(temporary)
            os.rename(temporary, path)
            sync(path.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raise RunFailedError, naming `path`, where the block meets an OSError.

    Also where torch has made a RuntimeError of it, which says nothing of the disk.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, OSError):
            cause = cause.__cause__ or cause.__context__
        if cause is None:
            raise
        try:
            with full_disk_named(path):
                raise cause
        except OSError:
            raise RunFailedError(f"{path}: cannot be written: {reason(cause)}") from error


# ------------------------------------------------------------------ locking


class Locked(Exception):
    """A lock that is taken; `holder` says by whom: "process PID on HOST"."""

    def __init__(self, holder: str) -> None:
        super().__init__(f"held by {holder}")
        self.holder = holder


@contextlib.contextmanager
def lock(path: Path, *, blocking: bool = True) -> Iterator[None]:
    """Hold the lock file `path`, which is there, with its holder's name, while it is held.

    Ends with its process, however that ends. Its folder is made if need be. Waits for another
    holder, or raises Locked if not `blocking`. On a file system without locks it warns, and guards
    nothing. Raises RunFailedError on a full disk.
    """
    while True:
        with full_disk_named(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            # Appending, for opening must not wipe out the name of another holder.
            file = open(path, "ab+", buffering=0)  # noqa: SIM115
        with file:
            if not _acquire(file, path, blocking):
                continue
            with full_disk_named(path):
                file.truncate(0)
                file.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
            try:
                yield
            finally:
                # Only ever removed by its holder: see `_acquire`.
                path.unlink(missing_ok=True)
            return


def _acquire(file: BinaryIO, path: Path, blocking: bool) -> bool:
    """Lock `file`; False if its last holder has removed it, so that `path` is another one."""
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().decode(errors="replace") or "another process"
            if not blocking:
                raise Locked(holder) from None
            log.info("waiting for %s, which holds %s", holder, path)
            fcntl.flock(file, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        log.warning("%s: this file system has no locks; start only one process at a time", path)
        return True
    # Opened, not just looked up: on NFS only that asks the server.
    with contextlib.suppress(FileNotFoundError), open(path, "rb") as current:
        return os.path.samestat(os.fstat(file.fileno()), os.fstat(current.fileno()))
    return False
