"""What `ray_jobs.doctor` looks at in a training job itself: config, data, run, disk, memory.

Each check returns findings and none raises for what it finds, so that the next one still runs.
Nothing is left behind: what has to be tried (making a folder) is undone. The machine, the cluster
and the services around a job are the business of `_site_checks`.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections import Counter, deque
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Literal

from modular_lm.config import TrainConfig
from modular_lm.config.checks import dump_dir_of, resolve, warnings_of, world_sizes
from modular_lm.config.schema import TokenizerConfig
from modular_lm.data.builtin import BUILTIN, builtin_folder
from modular_lm.data.dataset import check_sources, source_names
from modular_lm.data.manifest import Manifest
from modular_lm.errors import UserFacingError, reason
from modular_lm.model.flops import parameters, trained_matrices, trained_parameters
from modular_lm.model.memory import memory_estimate
from modular_lm.submission import check_lasting
from modular_lm.tokenizer import Tokenizer, build_tokenizer
from modular_lm.tracking.run_folder import RunFolder
from modular_lm.train.inventory import (
    COMPLETE,
    checkpoints_of,
    complete_steps,
    rules_of,
    step_folder,
)
from modular_lm.train.run import open_run, resolve_config

Level = Literal["ok", "warning", "error"]
_NUMBER_BYTES = 4  # checkpoints hold weights and the optimizer's moments in fp32
_TIGHT = 0.8  # the share of a resource from which a warning is due


@dataclass(frozen=True)
class Finding:
    """One row of the table. advice: what to do, where the text does not say it."""

    check: str
    level: Level
    text: str
    advice: str = ""


def training_findings(config: TrainConfig, device_gib: float | None) -> list[Finding]:
    """All that can be said about a training job without starting it.

    device_gib: memory of the device that it will run on, in GiB; None if that is not known.
    """
    found, tokenizer = [], None
    try:
        tokenizer = build_tokenizer(config.data.tokenizer)
        found.append(Finding("tokenizer", "ok", f"{tokenizer.name}, {tokenizer.n_words:,} tokens"))
    except (UserFacingError, OSError) as error:
        found.append(Finding("tokenizer", "error", reason(error)))
    resolved, row = _resolved(config, tokenizer)
    found.append(row)
    found += _data(config, tokenizer)
    folder = Path(dump_dir_of(config)).expanduser().absolute()
    found.append(dump_dir_finding(folder))
    if resolved is None or tokenizer is None:
        return found
    found += [Finding("config", "warning", text) for text in warnings_of(resolved)]
    if all(row.level != "error" for row in found):
        found.append(_run(resolved, tokenizer))
    found.append(disk_finding(resolved, folder))
    found.append(memory_finding(resolved, device_gib))
    return found


def _resolved(
    config: TrainConfig, tokenizer: Tokenizer | None
) -> tuple[TrainConfig | None, Finding]:
    """The config with all defaults, None where it cannot run."""
    try:
        check_lasting(config)
        if tokenizer is None:  # its keys may contradict each other all the same
            resolve(config, max(1, config.model.vocab_size))
            return None, Finding("config", "ok", "its keys agree (the model is unknown so far)")
        resolved, _ = resolve_config(config)
    except (UserFacingError, OSError) as error:
        return None, Finding("config", "error", reason(error))
    count = parameters(resolved.model).total
    steps = resolved.stop_at or resolved.steps
    return resolved, Finding("config", "ok", f"{count:,} parameters, {steps:,} steps")


def _data(config: TrainConfig, tokenizer: Tokenizer | None) -> list[Finding]:
    """Whether each source is there, whole, and made with this tokenizer."""
    found = []
    names = source_names(config.data)
    if BUILTIN in names and tokenizer is not None:
        found.append(_builtin(config.data.tokenizer))
    named = [name for name in names if name != BUILTIN]
    if not named:
        return found
    if tokenizer is None:
        return [*found, Finding("data", "warning", "not checked: that needs the tokenizer")]
    root = Path(config.data.root_dir or "").expanduser()
    try:
        check_sources(config.data, tokenizer)
        manifests = [Manifest.load(root / name) for name in named]
    except (UserFacingError, OSError) as error:
        return [*found, Finding("data", "error", reason(error))]
    for name, manifest in zip(named, manifests, strict=True):
        text = f"{name}: {manifest.train.tokens:,} tokens, this tokenizer's"
        found.append(Finding("data", "ok", f"{text} (fingerprint {manifest.fingerprint[:12]})"))
        if config.eval.validation.max_docs and not manifest.val.documents:
            found.append(
                Finding(
                    "data",
                    "error",
                    f"{name}: holds no validation documents",
                    "prepare it with val_fraction > 0, or set eval.validation.max_docs=0",
                )
            )
    return found


def _builtin(tokenizer: TokenizerConfig) -> Finding:
    folder, whole = builtin_folder(tokenizer)
    state = "prepared" if whole else "will be prepared by the job, in seconds"
    return Finding("data", "ok", f"builtin: {state}, in {folder}")


def _run(config: TrainConfig, tokenizer: Tokenizer) -> Finding:
    """What the run's folder holds already, and whether this command may continue it."""
    assert config.dump_dir is not None
    folder = RunFolder(config.dump_dir)
    if BUILTIN in source_names(config.data) and not builtin_folder(config.data.tokenizer)[1]:
        return Finding("run", "ok", "not compared with what its folder may hold: see data")
    try:
        run = open_run(config, tokenizer, world_sizes(config.ray)[1])
    except (UserFacingError, OSError) as error:
        return Finding("run", "error", reason(error))
    if run.is_complete:
        return Finding("run", "warning", f"complete: step {run.done_steps} of {run.stop_step}")
    if run.done_steps:
        changed = "".join(f"; {change}" for change in (*run.config_changes, *run.data_changes))
        return Finding("run", "ok", f"continues from step {run.done_steps}{changed}")
    return Finding("run", "ok", f"new, in {folder.path}")


def dump_dir_finding(folder: Path) -> Finding:
    """Make the folder, write a file, and undo both."""
    made = []
    try:
        for path in reversed(_missing(folder)):
            path.mkdir()
            made.append(path)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"x" * 4096)
            file.flush()
    except OSError as error:
        text = f"{folder}: cannot be made or written: {reason(error)}"
        return Finding("dump_dir", "error", text, "choose a folder that you may write to")
    finally:
        for path in reversed(made):
            path.rmdir()
    return Finding("dump_dir", "ok", f"{folder}: can be {'made and ' if made else ''}written")


def _missing(folder: Path) -> list[Path]:
    """The folder and those above it that are not there, the folder first."""
    chain = [folder, *folder.parents]
    return list(takewhile(lambda path: not os.path.lexists(path), chain))


def disk_finding(config: TrainConfig, folder: Path) -> Finding:
    """Whether the checkpoints to come fit on the disk that is to hold them. Quotas are not seen."""
    checkpoints = checkpoints_of(config.checkpoint, folder)
    if not isinstance(checkpoints, Path):
        return Finding("disk", "ok", f"checkpoint.path={checkpoints}: not checked")
    there = existing_parent(checkpoints.absolute())
    sizes = [_size(step_folder(checkpoints, step)) for step in complete_steps(checkpoints)]
    each = max(sizes, default=0) or checkpoint_bytes(config)
    count = checkpoints_at_once(config)
    needed, free = max(0, count * each - sum(sizes)), shutil.disk_usage(there).free
    text = (
        f"{count} checkpoints of {_shown(each)} need {_shown(needed)} more, {there} has "
        f"{_shown(free)} free (quotas are not seen)"
    )
    advice = "keep fewer (checkpoint.dump.keep, checkpoint.eval.keep) or use another disk"
    return Finding("disk", _level(needed, free), text, advice)


def checkpoint_bytes(config: TrainConfig) -> int:
    """Size of a checkpoint of a resolved config, without its few kilobytes of JSON."""
    moments = 2 * trained_parameters(config.model)
    if config.optim.name == "muon":  # has one for a matrix
        moments -= trained_matrices(config.model)
    return _NUMBER_BYTES * (parameters(config.model).total + moments)


def checkpoints_at_once(config: TrainConfig) -> int:
    """The most checkpoints that lie in the run's folder at a time, one being written included."""
    last = config.stop_at or config.steps
    periods = [
        every for c in (config.checkpoint.dump, config.checkpoint.eval) if (every := c.every)
    ]
    saved = {step for every in periods for step in range(every, last + 1, every)} | {last}
    rules = [(keep, counts, deque[int]()) for keep, counts in rules_of(config.checkpoint)]
    held: Counter[int] = Counter()  # by how many rules
    most = 0
    for step in sorted(saved):
        most = max(most, len(held) + 1)
        for keep, counts, newest in rules:
            if counts(step):
                newest.append(step)
                held[step] += 1
            if len(newest) > keep > 0:
                left = newest.popleft()
                held[left] -= 1
                if not held[left]:
                    del held[left]
    return most


def _size(folder: Path) -> int:
    listing = json.loads((folder / COMPLETE).read_text())["files"]
    return sum(file["bytes"] for file in listing.values())


def memory_finding(config: TrainConfig, device_gib: float | None) -> Finding:
    """The estimate of `dry_run` against the memory of the device of one worker."""
    needed = memory_estimate(config, world_sizes(config.ray)[0]).total
    text = f"about {_shown(needed)} per worker (roughly)"
    if device_gib is None:
        return Finding("memory", "ok", text, "device_memory=GIB compares it with a device")
    text += f", the device has {device_gib:,.1f} GiB"
    advice = (
        "use more workers, a smaller data.batch_size with grad_acc_steps, model_dtype=bf16, or "
        "distributed.activation_checkpointing=full"
    )
    return Finding("memory", _level(needed / 2**30, device_gib), text, advice)


def existing_parent(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    return next(p for p in (folder, *folder.parents) if os.path.isdir(p))


def _level(needed: float, there: float) -> Level:
    return "error" if needed > there else "warning" if needed > _TIGHT * there else "ok"


def _shown(size: float) -> str:
    return f"{size / 2**30:,.1f} GiB" if size >= 2**30 else f"{size / 2**20:,.1f} MiB"
