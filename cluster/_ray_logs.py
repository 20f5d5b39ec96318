"""Ray's logs of one node, brought from its own disk into the run's folder, in bounded size."""

from __future__ import annotations

import contextlib
from pathlib import Path

_LARGEST_FILE = 4 << 20
_LARGEST_SUM = 64 << 20


def save_logs(ray_folder: Path, destination: Path) -> int:
    """Copy the ends of the log files below Ray's folder, the newest first; returns bytes copied.

    Logs are a help, not a result: what cannot be read or written is left out.
    """
    files = [*ray_folder.glob("session_[0-9]*/logs/**/*"), *ray_folder.glob("*.log")]
    aged = []
    for file in files:
        with contextlib.suppress(OSError):
            if file.is_file() and not file.is_symlink() and (size := file.stat().st_size):
                aged.append((file.stat().st_mtime, size, file))
    copied = 0
    for _, size, file in sorted(aged, reverse=True):
        taken = min(size, _LARGEST_FILE)
        if copied + taken > _LARGEST_SUM:
            break
        with contextlib.suppress(OSError):
            _copy_end(file, destination / _name(file, ray_folder), size - taken)
            copied += taken
    return copied


def _name(file: Path, ray_folder: Path) -> Path:
    relative = file.relative_to(ray_folder)
    inside = relative.parts[2:] if len(relative.parts) > 2 else relative.parts
    return Path(*inside)


def _copy_end(file: Path, copy: Path, start: int) -> None:
    copy.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "rb") as source:
        source.seek(start)
        copy.write_bytes(source.read(_LARGEST_FILE))
