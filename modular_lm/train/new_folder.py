"""A folder that appears whole or not at all; what a failing disk says, also through torch."""

from __future__ import annotations

import contextlib
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

from modular_lm.errors import ConfigError, RunFailedError, reason
from modular_lm.files import full_disk_named, sync_folder


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
                _sync(file)
            sync_folder(temporary)
            os.rename(temporary, path)
            sync_folder(path.parent)
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


def _sync(file: Path) -> None:
    handle = os.open(file, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
