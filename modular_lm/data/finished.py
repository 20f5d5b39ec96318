"""Finished work: what a task has made is on record beside its files, so that no task is done twice.

A task has a name made of a hash of all that decides what it makes. Its record is written, durably
and at once, after its files are; so a record that is there can be believed, and a name that is not
expected is debris. Who runs tasks, and in what order, is up to the caller.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from modular_lm.files import write_text_atomic

_SUFFIX = ".json"


def task_hash(*parts: Any) -> str:
    """Hash of values that JSON can hold: equal for equal values, in every process."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def record(folder: Path, name: str, result: dict[str, Any]) -> None:
    """Put the result of a task whose files are durable on record."""
    write_text_atomic(folder / f"{name}{_SUFFIX}", json.dumps(result))


def recorded(folder: Path, name: str) -> dict[str, Any] | None:
    """The result of a task, or None if it is not finished."""
    try:
        return json.loads((folder / f"{name}{_SUFFIX}").read_bytes())
    except (FileNotFoundError, ValueError):
        return None


def has_size(file: Path, size: int) -> bool:
    """Whether a file of this size is there."""
    try:
        return file.stat().st_size == size
    except FileNotFoundError:
        return False


def sweep(folder: Path, records: Iterable[str], files: Iterable[str]) -> int:
    """Remove everything in `folder` but these records and files; returns how much was removed."""
    kept = {*files, *(f"{name}{_SUFFIX}" for name in records)}
    removed = 0
    for path in folder.iterdir():
        if path.name in kept:
            continue
        removed += 1
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with contextlib.suppress(FileNotFoundError):  # a task that just died may tidy up, too
                path.unlink()
    return removed
