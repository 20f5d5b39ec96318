"""A copy of the code that ran, and where it came from, for the run's folder.

Takes the project's own sources and configs; not data, environments or caches.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import modular_lm
from modular_lm.files import full_disk_named, write_text_atomic

_PACKAGES = ("modular_lm", "ray_jobs", "cluster")
_CHECKOUT_ONLY = ("configs", "pyproject.toml")
_LARGEST_SOURCE = 1 << 20
ORIGIN_FILE = "snapshot.json"


def snapshot_code(destination: Path) -> dict[str, Any]:
    """Replace `destination` by a copy of the code, with its origin in `snapshot.json`.

    Returns the origin: `version`, and `git_commit` and `dirty` (uncommitted changes in what was
    copied), both None outside of a git checkout. The copy is complete before it gets its name. If
    the code that runs is that copy, as in a job of SLURM, it stays. Raises RunFailedError on a
    full disk.
    """
    root = Path(modular_lm.__file__).resolve().parents[1]
    if root == destination.resolve():
        return json.loads((root / ORIGIN_FILE).read_text())
    in_checkout = (root / "pyproject.toml").is_file()
    wanted = _PACKAGES + (_CHECKOUT_ONLY if in_checkout else ())
    names = [name for name in wanted if (root / name).exists()]
    commit, dirty = _git_state(root, names) if in_checkout else (None, None)
    origin = {"version": modular_lm.__version__, "git_commit": commit, "dirty": dirty}

    incoming = destination.with_name(f".{destination.name}.new")
    outgoing = destination.with_name(f".{destination.name}.old")
    for leftover in (incoming, outgoing):
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        with full_disk_named(destination):
            incoming.mkdir(parents=True)
            for name in names:
                _copy(root / name, incoming / name)
        write_text_atomic(incoming / ORIGIN_FILE, json.dumps(origin, indent=2) + "\n")
    except BaseException:
        shutil.rmtree(incoming, ignore_errors=True)
        raise
    # A folder that is not empty cannot be replaced by one call.
    if destination.exists():
        destination.rename(outgoing)
    incoming.rename(destination)
    shutil.rmtree(outgoing, ignore_errors=True)
    return origin


def _copy(source: Path, target: Path) -> None:
    """Not by shutil.copytree, whose errors are a text of all files and do not tell a full disk."""
    if source.is_dir():
        target.mkdir()
        for inner in source.iterdir():
            if not _is_ignored(inner):
                _copy(inner, target / inner.name)
    else:
        shutil.copy2(source, target)


def _is_ignored(path: Path) -> bool:
    """Whether it is a cache, hidden, or too big to be a source."""
    if path.name == "__pycache__" or path.name.startswith(".") or path.suffix in (".pyc", ".so"):
        return True
    return path.is_file() and path.stat().st_size > _LARGEST_SOURCE


def _git_state(root: Path, names: list[str]) -> tuple[str | None, bool | None]:
    """Commit and whether `names` differ from it; None where `root` is not the repository's top."""
    top = _git(root, "rev-parse", "--show-toplevel")
    commit = _git(root, "rev-parse", "HEAD")
    if not commit or not top or Path(top).resolve() != root:
        return None, None
    changed = _git(root, "status", "--porcelain", "--", *names)
    return commit, None if changed is None else bool(changed)


def _git(root: Path, *args: str) -> str | None:
    """What git prints; None if it fails or there is no git."""
    command = ["git", "-C", str(root), *args]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
