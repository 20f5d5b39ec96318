"""The job that is to be launched, checked as it will check itself: before anything is submitted.

Training is checked to the last (data, tokenizer, and what the run's folder already holds), a sweep
as far as its baseline; of other jobs the keys are. Writes nothing.
"""

from __future__ import annotations

import difflib
import logging
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from cluster.options import LaunchConfig, unknown
from modular_lm.config import JOBS, SweepConfig, TrainConfig, load_config
from modular_lm.config.checks import dump_dir_of, world_sizes
from modular_lm.config.load import from_dict
from modular_lm.data.builtin import BUILTIN, builtin_folder
from modular_lm.data.dataset import check_sources, source_names
from modular_lm.errors import ConfigError
from modular_lm.storage import place
from modular_lm.sweep.trials import plan_sweep
from modular_lm.train.inventory import newest_step
from modular_lm.train.run import open_run, resolve_config
from ray_jobs._session import SPARE_CPUS

log = logging.getLogger(__name__)

# Keys whose text is a path, by their end; the text of `_MAYBE` can be a name instead.
_PATHS = ("root_dir", "dump_dir", "dst", "out", "ckpt", "init_ckpt_path", "checkpoint.path")
_MAYBE = ("tokenizer.path", "src")
_SQLITE = "sqlite:///"


@dataclass(frozen=True)
class Job:
    """A checked job.

    given: its config as given, with absolute paths; workers: the fewest and the most training
    workers, None for jobs without; complete: there is nothing left to do; is_named: its name or
    folder is of its own, not a default.
    """

    script: str
    given: dict[str, Any]
    dump_dir: Path
    name: str
    workers: tuple[int, int] | None = None
    cpus_per_worker: int = 1
    complete: bool = False
    is_named: bool = True


def check_job(options: LaunchConfig, args: Sequence[str], *, afresh: bool = False) -> Job:
    """Check the job of these arguments. Raises ConfigError, DataError or CheckpointError.

    afresh: what its folder holds is going to be deleted.
    """
    if options.script not in JOBS:
        raise unknown("script", options.script, list(JOBS))
    cls = JOBS[options.script]
    keys = [f.name for f in fields(cls)]
    _check_names(args, keys)
    own = [arg for arg in args if arg.startswith("dump_dir=") and "dump_dir" not in keys]
    _check_store(os.environ.get("MLFLOW_TRACKING_URI", ""))
    config, given = load_config(cls, [arg for arg in args if arg not in own])
    if isinstance(config, SweepConfig):
        return _check_sweep(options, config, given)
    given = _with_absolute_paths(given)
    if cls is TrainConfig:
        return _check_training(options, given, afresh)
    if not own:
        raise ConfigError(
            f"dump_dir: {options.script} has none of its own; name a folder for the batch script "
            "and the log"
        )
    dump_dir = _folder(own[-1].partition("=")[2])
    return Job(options.script, given, dump_dir, options.script.rpartition(".")[2])


def fit(options: LaunchConfig, job: Job) -> LaunchConfig:
    """The options with `cpus_per_node` filled in. Raises ConfigError if the job does not fit."""
    gpus = options.gpus_per_node or 0
    if job.workers is None:
        if options.cpus_per_node is None:
            raise ConfigError(f"cpus_per_node: say how many CPUs {job.script} gets on each node")
        return options
    most, all_gpus = job.workers[1], options.nodes * gpus
    if gpus and most > all_gpus:
        raise ConfigError(
            f"ray.num_workers={most}: nodes={options.nodes} with gpus_per_node={gpus} have "
            f"{all_gpus} GPUs; use as many workers, or more nodes"
        )
    if most < all_gpus:
        log.warning("ray.num_workers=%d: %d of %d GPUs stay idle", most, all_gpus - most, all_gpus)
    elif not gpus and most < options.nodes:
        idle = options.nodes - most
        log.warning("ray.num_workers=%d: %d of %d nodes train nothing", most, idle, options.nodes)
    per_node = math.ceil(most / options.nodes) * job.cpus_per_worker
    cpus = options.cpus_per_node or per_node + SPARE_CPUS
    needed = most * job.cpus_per_worker + 1
    if cpus < per_node or options.nodes * cpus < needed:
        raise ConfigError(
            f"cpus_per_node={cpus}: {most} workers of {job.cpus_per_worker} CPUs, and their data, "
            f"need {per_node + 1} on each of {options.nodes} nodes"
        )
    return replace(options, cpus_per_node=cpus)


def fewest_nodes(options: LaunchConfig, job: Job) -> int:
    """How many nodes the job can go on with: fewer than all only if its workers may be fewer."""
    if job.workers is None or job.workers[0] == job.workers[1]:
        return options.nodes
    fewest, most = job.workers
    return min(options.nodes, math.ceil(fewest / math.ceil(most / options.nodes)))


def _check_names(args: Sequence[str], keys: list[str]) -> None:
    """Raise ConfigError where a name that the job does not have is nearly one of the launcher's."""
    own = [f.name for f in fields(LaunchConfig)]
    for arg in args:
        name = arg.partition("=")[0].lstrip("-")
        if not name or "." in name or name in (*keys, "config", "dump_dir"):
            continue
        close = difflib.get_close_matches(name, [*own, *keys], n=1)
        if close and close[0] in own:
            raise ConfigError(f"unknown key {name}: did you mean {close[0]}?")


def _check_store(uri: str) -> None:
    """Raise ConfigError for a database that the job would look for in the copy of the code."""
    if uri.startswith(_SQLITE) and not uri.startswith(f"{_SQLITE}/"):
        raise ConfigError(
            f"MLFLOW_TRACKING_URI={uri}: is relative, and the job runs in another folder; give an "
            f"absolute path, e.g. {_absolute('.tracking_uri', uri)}"
        )


def _check_training(options: LaunchConfig, given: dict[str, Any], afresh: bool) -> Job:
    gpus = options.nodes * (options.gpus_per_node or 0)
    if gpus and "num_workers" not in (given.get("ray") or {}):
        given = {**given, "ray": {**(given.get("ray") or {}), "num_workers": gpus}}
    given = {key: value for key, value in given.items() if key != "dry_run"}
    config = from_dict(TrainConfig, given)
    dump_dir = _folder(dump_dir_of(config))
    # A run that is to be deleted is none that could be continued.
    looked_at = str(dump_dir / ".afresh" if afresh else dump_dir)
    if afresh:
        config = _without_checkpoints(config)
    resolved, tokenizer = resolve_config(replace(config, dump_dir=looked_at))
    workers = world_sizes(resolved.ray)
    complete = False
    if BUILTIN in source_names(resolved.data) and not builtin_folder(resolved.data.tokenizer)[1]:
        check_sources(resolved.data, tokenizer)  # the job itself makes the built-in corpus
    else:
        complete = open_run(resolved, tokenizer, workers[1]).is_complete
    return Job(
        script=options.script,
        given={**given, "dump_dir": str(dump_dir)},
        dump_dir=dump_dir,
        name=resolved.name,
        workers=workers,
        cpus_per_worker=resolved.ray.cpus_per_worker,
        complete=complete,
        is_named=_is_named(given),
    )


def _without_checkpoints(config: TrainConfig) -> TrainConfig:
    """The config as if `checkpoint.path`, of which nothing is deleted, were not there.

    Raises ConfigError if it holds checkpoints, which the new run would go on from, or not fit.
    """
    path = config.checkpoint.path
    if path is not None and newest_step(place(path)):
        raise ConfigError(
            f"override=true: deletes nothing in checkpoint.path={path}, which holds checkpoints; "
            "delete them yourself, or choose another place"
        )
    return replace(config, checkpoint=replace(config.checkpoint, path=None))


def _check_sweep(options: LaunchConfig, config: SweepConfig, given: dict[str, Any]) -> Job:
    plan = plan_sweep(config, given)
    resolved, tokenizer = resolve_config(from_dict(TrainConfig, plan.first_of_baseline.given))
    check_sources(resolved.data, tokenizer)
    # With the keys of sweep.base in it, the job needs no other file.
    settings = {**_with_absolute_paths(given["sweep"]), "base": None}
    shared = _with_absolute_paths(plan.base)
    folder = _folder(dump_dir_of(config))
    own = {"name": config.name, "dump_dir": str(folder), "sweep": settings}
    return Job(options.script, {**shared, **own}, folder, config.name, is_named=_is_named(given))


def _is_named(given: dict[str, Any]) -> bool:
    return bool(given.get("name") or given.get("dump_dir"))


def _with_absolute_paths(values: dict[str, Any], prefix: str = ".") -> dict[str, Any]:
    """The config for a job that runs in another folder."""
    changed = {}
    for name, value in values.items():
        if isinstance(value, dict):
            value = _with_absolute_paths(value, f"{prefix}{name}.")
        elif isinstance(value, str) and value:
            value = _absolute(f"{prefix}{name}", value)
        changed[name] = value
    return changed


def _absolute(key: str, value: str) -> str:
    """The value of a key that begins with a dot, absolute where it is a relative path."""
    if key.endswith(".tracking_uri") and value.startswith(_SQLITE):
        return _SQLITE + os.path.abspath(value.removeprefix(_SQLITE))
    path = os.path.abspath(os.path.expanduser(value))
    if "://" in value or not key.endswith(tuple(f".{end}" for end in (*_PATHS, *_MAYBE))):
        return value
    is_name = key.endswith(tuple(f".{end}" for end in _MAYBE)) and not os.path.exists(path)
    return value if is_name else path


def _folder(text: str) -> Path:
    if not text or "://" in text:
        raise ConfigError(f"dump_dir={text}: must be a folder that all nodes share")
    folder = Path(text).expanduser().resolve()
    there = next(p for p in (folder, *folder.parents) if os.path.lexists(p))
    if there.is_dir() and not os.access(there, os.W_OK | os.X_OK):
        raise ConfigError(f"dump_dir={folder}: {there} cannot be written; choose another folder")
    if not there.is_dir() and there != folder:
        raise ConfigError(f"dump_dir={folder}: {there} is a file; choose another folder")
    return folder
