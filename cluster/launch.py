"""All checks of a launch, in one place: what `cluster.slurm` may then write and submit.

Options and requests go in, a `Launch` comes out; nothing is written here. What a job's own config
must be like is in `checks`, what may be in its folder in `folders`.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from cluster.checks import Job, check_job, fewest_nodes, fit
from cluster.folders import check_folder
from cluster.jobs import ActiveJob, active_job, ending, has_sbatch, try_script
from cluster.options import LaunchConfig, check_options, check_words
from cluster.ports import block_size
from cluster.script import batch_script, check_container, check_name, check_path, on_nodes
from cluster.sites import NodeSetup, apply_site, load_site
from modular_lm.errors import ConfigError

_COMMAND = "python -m cluster.slurm"


@dataclass(frozen=True)
class Launch:
    """A launch, checked.

    jobs: all that were asked for; todo: those that are to be submitted; active: by folder, the jobs
    that are there already; array_dir: of a job array; script: the batch script's text; starts: what
    SLURM says of when it would start.
    """

    options: LaunchConfig
    setup: NodeSetup
    jobs: list[Job]
    todo: list[Job]
    active: dict[Path, ActiveJob] = field(default_factory=dict)
    array_dir: Path | None = None
    script: str = ""
    starts: str = ""


def prepare(
    options: LaunchConfig,
    requests: Sequence[Sequence[str]],
    again: Callable[[Sequence[Job]], Sequence[str]],
    *,
    is_array: bool,
) -> Launch:
    """Check everything; writes nothing. Raises UserFacingError.

    requests: for each job the arguments of its config; again: the arguments that submit these jobs
    once more, for who reads the script.
    """
    options, setup = _settled(options, is_array)
    jobs = [check_job(options, args, afresh=options.override) for args in requests]
    _check_distinct(jobs)
    for job in jobs:
        check_path(job.dump_dir, "dump_dir")
        check_name(job.name)
        check_folder(job.dump_dir, options)
    active = _active(options, jobs, is_array)
    options = replace(options, cpus_per_node=_cpus(options, jobs, setup))
    todo = [job for job in jobs if not job.complete and job.dump_dir not in active]
    launch = Launch(options, setup, jobs, todo, active)
    if not todo:
        return launch
    array_dir = _array_dir(options, jobs[0]) if is_array else None
    script = batch_script(
        options,
        [job.dump_dir for job in todo],
        command=f"cd {shlex.quote(os.getcwd())} && {_COMMAND} {shlex.join(again(jobs))}",
        name=todo[0].name,
        setup=setup,
        array_dir=array_dir,
        no_kill=any(fewest_nodes(options, job) < options.nodes for job in todo),
    )
    starts = ""
    if options.launcher == "sbatch" and (has_sbatch() or not options.dry_run):
        starts = try_script(script, options)
    return replace(launch, array_dir=array_dir, script=script, starts=starts)


def _settled(options: LaunchConfig, is_array: bool) -> tuple[LaunchConfig, NodeSetup]:
    """The options, checked, with what the site adds to them."""
    check_options(options)
    if not is_array and (options.array_limit or options.array_dir):
        raise ConfigError("array_limit and array_dir: are for a job array: configs=[...]")
    if options.launcher == "bash":
        options = _inside_allocation(options)
    options, setup = apply_site(on_nodes(options), load_site(options.site), os.environ)
    check_words(options)  # again, with what the site and its variable have added
    check_container(options, setup)
    return options, setup


def _cpus(options: LaunchConfig, jobs: Sequence[Job], setup: NodeSetup) -> int:
    """CPUs of each node, enough for all of the jobs. Raises ConfigError if they do not fit."""
    cpus = max(fit(options, job).cpus_per_node or 1 for job in jobs)
    first, end = setup.port_range
    if end - first < block_size(cpus):
        raise ConfigError(
            f"port_range=[{first}, {end}]: a node of {cpus} CPUs needs {block_size(cpus)} ports; "
            f"give more of them in the profile of site={options.site}"
        )
    return cpus


def _inside_allocation(options: LaunchConfig) -> LaunchConfig:
    """For launcher=bash: the options of the allocation that this runs in."""
    if "SLURM_JOB_ID" not in os.environ:
        raise ConfigError("launcher=bash: this is no allocation of SLURM; get one, e.g. by salloc")
    nodes = int(os.environ.get("SLURM_JOB_NUM_NODES", "1"))
    if options.nodes not in (1, nodes):
        raise ConfigError(f"nodes={options.nodes}: the allocation has {nodes}")
    cpus, gpus = options.cpus_per_node, options.gpus_per_node
    # E.g. "8(x2),4": eight on each of two nodes, four on a third.
    each = re.findall(r"(?:^|,)(\d+)", os.environ.get("SLURM_JOB_CPUS_PER_NODE", ""))
    if cpus is None and each:
        cpus = min(map(int, each))
    if gpus is None and "SLURM_GPUS_ON_NODE" in os.environ:
        gpus = int(os.environ["SLURM_GPUS_ON_NODE"])
    # Nothing would start again what was typed into a shell.
    return replace(options, nodes=nodes, cpus_per_node=cpus, gpus_per_node=gpus, requeue=False)


def _check_distinct(jobs: Sequence[Job]) -> None:
    seen: set[Path] = set()
    for number, job in enumerate(jobs, 1):
        if len(jobs) > 1 and not job.is_named:
            raise ConfigError(
                f"configs: number {number} has neither name nor dump_dir, and would be "
                f"{job.dump_dir}; give each of them a name of its own"
            )
        if job.dump_dir in seen:
            raise ConfigError(
                f"dump_dir={job.dump_dir}: two of the configs have it; give each of them a name, "
                "or a dump_dir, of its own"
            )
        seen.add(job.dump_dir)


def _active(options: LaunchConfig, jobs: Sequence[Job], is_array: bool) -> dict[Path, ActiveJob]:
    """By folder: jobs that are queued or running there. Raises ConfigError if there is one, unless
    there are tasks of an array which can be submitted without it."""
    if options.dry_run and not has_sbatch():
        return {}  # without SLURM the script can be looked at all the same
    found = {job.dump_dir: active_job(job.dump_dir) for job in jobs}
    active = {folder: there for folder, there in found.items() if there is not None}
    others = [job for job in jobs if not job.complete and job.dump_dir not in active]
    if active and (not is_array or options.override or not others):
        folder, there = next(iter(active.items()))
        end = ending([there.job_id], there.state)
        raise ConfigError(
            f"dump_dir={folder}: job {there.job_id} is there already, {there.state}; wait for it"
            + (f", or end it: {end}" if end else "")
        )
    return active


def _array_dir(options: LaunchConfig, first: Job) -> Path:
    if options.array_dir:
        folder = Path(options.array_dir).expanduser().resolve()
    else:
        folder = first.dump_dir.parent / f"array_{first.dump_dir.name}"
    check_path(folder, "array_dir")
    return folder
