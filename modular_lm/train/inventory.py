"""Which checkpoints a run has, whether one is whole, and which are kept: the one truth of all jobs.

A checkpoint is a folder `<dump_dir>/checkpoints/<step, ten digits>` and exists when its `COMPLETE`
file does. That file is written last, atomically, after every rank has finished writing, and lists
size and SHA-256 of every other file. Anything else in `checkpoints/` is debris of an interrupted
save: readers ignore it and the next save sweeps it away. Imports no torch.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from pathlib import Path
from typing import Any

from modular_lm.config.schema import CheckpointConfig
from modular_lm.errors import CheckpointError

log = logging.getLogger(__name__)

COMPLETE = "COMPLETE"


def step_folder(checkpoints: Path, step: int) -> Path:
    """Where the checkpoint of `step` lies, whether or not it exists."""
    return checkpoints / f"{step:010d}"


def complete_steps(checkpoints: Path) -> list[int]:
    """The steps of all complete checkpoints in a run's `checkpoints` folder, ascending."""
    if not checkpoints.is_dir():
        return []
    names = (p.name for p in checkpoints.iterdir() if (p / COMPLETE).is_file())
    return sorted(int(name) for name in names if name.isdigit())


def newest_step(checkpoints: Path) -> int:
    """The step of the newest complete checkpoint; 0 where there is none."""
    return (complete_steps(checkpoints) or [0])[-1]


def find(path: str, key: str = "ckpt") -> Path:
    """The checkpoint that the user's `key` names: its folder, or a run's: then the latest.

    Raises CheckpointError with what is there instead.
    """
    folder = Path(path)
    if folder.is_file():
        raise CheckpointError(
            f"{key}={path}: is a file, expected a checkpoint's folder; make one of it with "
            "ray_jobs.convert"
        )
    if not path or not folder.is_dir():
        raise CheckpointError(
            f"{key}={path}: no such folder; give a checkpoint or a run's dump_dir"
        )
    if (folder / COMPLETE).is_file():
        return folder
    checkpoints = folder if folder.name == "checkpoints" else folder / "checkpoints"
    if step := newest_step(checkpoints):
        return step_folder(checkpoints, step)
    if (folder / ".metadata").exists() or (folder / "params.json").exists():
        raise CheckpointError(
            f"{key}={path}: has no {COMPLETE} file: its save was interrupted; use an earlier one"
        )
    raise CheckpointError(f"{key}={path}: holds no complete checkpoint")


def verify(folder: Path, part: int = 0, parts: int = 1) -> None:
    """Check size and checksum of every `parts`-th file of a checkpoint, beginning with `part`.

    Raises CheckpointError naming the file that is missing, truncated or altered.
    """
    listing = json.loads((folder / COMPLETE).read_text())["files"]
    for name in sorted(listing)[part::parts]:
        path, wanted = folder / name, listing[name]
        if not path.is_file():
            raise CheckpointError(f"{path}: missing; the checkpoint cannot be used")
        size = path.stat().st_size
        if size != wanted["bytes"]:
            raise CheckpointError(
                f"{path}: {size} bytes where {COMPLETE} lists {wanted['bytes']}: truncated"
            )
        if describe(path) != wanted:
            raise CheckpointError(f"{path}: its SHA-256 is not the one in {COMPLETE}: damaged")


def describe(path: Path) -> dict[str, Any]:
    """Size and checksum of a file, as `COMPLETE` lists them."""
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}


def retain(checkpoints: Path, config: CheckpointConfig) -> list[int]:
    """Delete the complete checkpoints that `config` does not keep; returns their steps.

    Of the steps that are multiples of `eval.every` the newest `eval.keep` stay, of all others the
    newest `dump.keep`; the newest of all always stays.
    """
    steps = complete_steps(checkpoints)
    is_eval = [bool(config.eval.every and s % config.eval.every == 0) for s in steps]
    kept = {steps[-1]} if steps else set()
    for keep, group in ((config.eval.keep, True), (config.dump.keep, False)):
        members = [s for s, e in zip(steps, is_eval, strict=True) if e is group]
        kept |= set(members if keep <= 0 else members[-keep:])
    gone = [s for s in steps if s not in kept]
    for step in gone:
        _remove(step_folder(checkpoints, step))
    return gone


def sweep(checkpoints: Path) -> None:
    """Delete what interrupted saves have left."""
    if not checkpoints.is_dir():
        return
    for folder in checkpoints.iterdir():
        if folder.is_dir() and not (folder / COMPLETE).is_file():
            log.info("removing the rest of an interrupted save: %s", folder)
            _remove(folder)


def _remove(folder: Path) -> None:
    # COMPLETE goes first: a half-deleted checkpoint must not look whole.
    (folder / COMPLETE).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
