"""Which checkpoints a run has, whether one is whole, and which are kept: the one truth of all jobs.

A checkpoint is a folder `<step, ten digits>` below `checkpoint.path` (a path or URI; default
`<dump_dir>/checkpoints`) and exists when its `COMPLETE` file does. That file is written last,
atomically, after every rank has finished writing, and lists size and SHA-256 of every other file.
Any other folder there is debris of an interrupted save: readers ignore it and the next save sweeps
it away. Imports no torch.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, overload

from modular_lm.config.schema import CheckpointConfig
from modular_lm.errors import CheckpointError
from modular_lm.storage import Place, place, remove_folder, size_of

log = logging.getLogger(__name__)

COMPLETE = "COMPLETE"


def checkpoints_of(config: CheckpointConfig, dump_dir: Path) -> Place:
    """The folder of a run's checkpoints, one sub-folder per step."""
    return dump_dir / "checkpoints" if config.path is None else place(config.path)


@overload
def step_folder(checkpoints: Path, step: int) -> Path: ...
@overload
def step_folder(checkpoints: Place, step: int) -> Place: ...
def step_folder(checkpoints: Place, step: int) -> Place:
    """Where the checkpoint of `step` lies, whether or not it exists."""
    return checkpoints / f"{step:010d}"


def _is_step(name: str) -> bool:
    """Whether a folder's name is one that `step_folder` gives, not just any number (a year)."""
    return re.fullmatch("[0-9]{10}", name) is not None


def complete_steps(checkpoints: Place) -> list[int]:
    """The steps of all complete checkpoints in a run's folder of them, ascending."""
    if isinstance(checkpoints, Path) and not checkpoints.is_dir():
        return []
    folders = [p for p in checkpoints.iterdir() if _is_step(p.name)]
    return sorted(int(p.name) for p in folders if (p / COMPLETE).is_file())


def newest_step(checkpoints: Place) -> int:
    """The step of the newest complete checkpoint; 0 where there is none."""
    if isinstance(checkpoints, Path) and not checkpoints.is_dir():
        return 0
    steps = sorted((int(p.name) for p in checkpoints.iterdir() if _is_step(p.name)), reverse=True)
    # From the newest on, as a look into a folder of an object store is a request.
    return next((s for s in steps if (step_folder(checkpoints, s) / COMPLETE).is_file()), 0)


def find(path: str, key: str = "ckpt") -> Place:
    """The checkpoint that the user's `key` names: its folder, or a run's: then the latest.

    Raises CheckpointError with what is there instead.
    """
    folder = place(path)
    if path and folder.is_file():
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
    for checkpoints in (folder, _of_run(folder)):
        if step := newest_step(checkpoints):
            return step_folder(checkpoints, step)
    if (folder / ".metadata").exists() or (folder / "params.json").exists():
        raise CheckpointError(
            f"{key}={path}: has no {COMPLETE} file: its save was interrupted; use an earlier one"
        )
    raise CheckpointError(f"{key}={path}: holds no complete checkpoint")


def _of_run(folder: Place) -> Place:
    """Where the run in `folder` keeps its checkpoints, by its config if there is one."""
    config = folder / "config.yaml"
    if isinstance(config, Path) and config.is_file():
        import yaml

        values = yaml.safe_load(config.read_text()) or {}
        if path := (values.get("checkpoint") or {}).get("path"):
            return place(path)
    return folder / "checkpoints"


def read_complete(folder: Place) -> dict[str, Any]:
    """What the COMPLETE file of a checkpoint says. Raises CheckpointError, naming it."""
    try:
        about = json.loads((folder / COMPLETE).read_text())
        if not isinstance(about["files"], dict):
            raise TypeError
    except (FileNotFoundError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{folder / COMPLETE}: missing or damaged; {_go_on(folder)}"
        ) from error
    return about


def verify(folder: Place, part: int = 0, parts: int = 1) -> None:
    """Check size and checksum of every `parts`-th file of a checkpoint, beginning with `part`.

    Raises CheckpointError naming the file that is missing, truncated or altered.
    """
    listing = read_complete(folder)["files"]
    for name in sorted(listing)[part::parts]:
        path, wanted = folder / name, listing[name]
        if not path.is_file():
            raise CheckpointError(f"{path}: missing; {_go_on(folder)}")
        size = size_of(path)
        if size != wanted["bytes"]:
            raise CheckpointError(
                f"{path}: {size} bytes where {COMPLETE} lists {wanted['bytes']}: truncated; "
                f"{_go_on(folder)}"
            )
        if describe(path) != wanted:
            raise CheckpointError(
                f"{path}: its SHA-256 is not the one in {COMPLETE}: damaged; {_go_on(folder)}"
            )


def _go_on(folder: Place) -> str:
    """What to do about a checkpoint that cannot be used."""
    if not _is_step(folder.name):
        return "the checkpoint cannot be used"
    checkpoints = folder.parent
    earlier = [s for s in complete_steps(checkpoints) if s < int(folder.name)]
    before = f"that of step {earlier[-1]}" if earlier else "none before it: the run begins anew"
    return f"restore it, or delete {folder} to go on from the checkpoint before ({before})"


def describe(path: Place) -> dict[str, Any]:
    """Size and checksum of a file, as `COMPLETE` lists them."""
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
            size += len(block)
    return {"bytes": size, "sha256": digest.hexdigest()}


def retain(checkpoints: Place, config: CheckpointConfig) -> list[int]:
    """Delete the complete checkpoints that `config` does not keep; returns their steps.

    Of the steps that are multiples of `eval.every` the newest `eval.keep` stay; of those that are
    multiples of `dump.every`, or of neither, the newest `dump.keep`; of a step of both kinds either
    rule can keep the checkpoint. A rolling one stays until there is a newer one of any kind, the
    newest of all always.
    """
    steps = complete_steps(checkpoints)
    kept = {steps[-1]} if steps else set()
    rolling = {s for s in steps if _is_rolling(checkpoints, s, config)}
    for keep, counts in rules_of(config):
        members = [s for s in steps if counts(s) and s not in rolling]
        kept |= set(members if keep <= 0 else members[-keep:])
    gone = [s for s in steps if s not in kept]
    for step in gone:
        remove(step_folder(checkpoints, step))
    return gone


def rules_of(config: CheckpointConfig) -> list[tuple[int, Callable[[int], bool]]]:
    """How many of the newest each rule keeps (0 or less: all), and which steps count for it."""

    def is_eval(step: int) -> bool:
        return _is_due(step, config.eval.every)

    def is_dump(step: int) -> bool:
        return _is_due(step, config.dump.every) or not is_eval(step)

    return [(config.eval.keep, is_eval), (config.dump.keep, is_dump)]


def _is_due(step: int, every: int) -> bool:
    return bool(every) and step % every == 0


def _is_rolling(checkpoints: Place, step: int, config: CheckpointConfig) -> bool:
    """Whether a complete checkpoint was saved only against the loss of work."""
    if _is_due(step, config.eval.every) or _is_due(step, config.dump.every):
        return False
    try:
        return bool(read_complete(step_folder(checkpoints, step)).get("rolling"))
    except CheckpointError:
        return False  # damaged; whether to delete it is the user's decision


def sweep(checkpoints: Place) -> None:
    """Delete what interrupted saves have left."""
    if isinstance(checkpoints, Path) and not checkpoints.is_dir():
        return
    for folder in checkpoints.iterdir():
        # Others' folders may lie beside them, where checkpoint.path says so.
        if _is_step(folder.name) and folder.is_dir() and not (folder / COMPLETE).is_file():
            log.info("removing the rest of an interrupted save: %s", folder)
            remove(folder)


def remove(folder: Place) -> None:
    """Delete a checkpoint, or what there is of one."""
    # COMPLETE goes first: a half-deleted checkpoint must not look whole.
    (folder / COMPLETE).unlink(missing_ok=True)
    remove_folder(folder)
