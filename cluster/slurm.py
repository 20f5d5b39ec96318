"""Submit a job to SLURM: check its config, make its folder, copy the code, write the batch script.

The launcher's own keys are listed here; every other key belongs to the config of the job
(`python -m ray_jobs.train --help`). Nothing is written before all is checked. The same command
resumes a run that has stopped. From Python `launch_job` does the same. What runs inside the job is
`cluster.allocation`.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shlex
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

from cluster.checks import Job, check_job, fewest_nodes, fit
from cluster.folders import (
    check_folder,
    check_unused,
    confirm_override,
    is_ours,
    remove_run,
    write_job,
    write_script,
)
from cluster.jobs import active_job, has_sbatch, record_job, submit, try_script
from cluster.options import LaunchConfig, check_options, split_arguments
from cluster.plan import JobPlan
from cluster.script import batch_script, check_name, check_path, on_nodes
from cluster.sites import NodeSetup, apply_site, load_site
from cluster.summary import summary
from modular_lm.cli import run_job
from modular_lm.config import to_yaml
from modular_lm.config.load import from_dict
from modular_lm.errors import EXIT_DONE, ConfigError, UserFacingError
from modular_lm.tracking.run_folder import RunFolder

log = logging.getLogger(__name__)

USAGE = "python -m cluster.slurm config=configs/debug.yaml nodes=2 time=1:00:00 key=value ..."
_COMMAND = "python -m cluster.slurm"
# Not in the command that resumes: with override it would delete the run that it is to go on with.
_ONCE = ("dry_run", "yes", "override")


@dataclass(frozen=True)
class Launch:
    """A launch, checked.

    jobs: all that were asked for; todo: those that are not complete; array_dir: of a job array;
    script: the batch script's text; starts: what SLURM says of when it would start.
    """

    options: LaunchConfig
    setup: NodeSetup
    jobs: list[Job]
    todo: list[Job]
    array_dir: Path | None = None
    script: str = ""
    starts: str = ""


def launch_job(
    config: str | Path | Mapping[str, Any], overrides: Sequence[str] = (), **options: Any
) -> str | None:
    """Submit one job, as the command line does; returns its id, None if the run is complete.

    config: a YAML file, or its content; overrides: `key=value` for the job's config; options: the
    launcher's own keys (`LaunchConfig`). Raises UserFacingError before anything is written.
    """
    return _launch_from_python([config], overrides, options, is_array=False)[0]


def launch_jobs(
    configs: Sequence[str | Path | Mapping[str, Any]],
    overrides: Sequence[str] = (),
    **options: Any,
) -> list[str | None]:
    """Submit several jobs as one job array: see `launch_job`. The id of each, in their order."""
    return _launch_from_python(configs, overrides, options, is_array=True)


def main(options: LaunchConfig, args: Sequence[str]) -> int:
    """The command line, whose `args` are those for the job's config. Returns the exit code."""
    requests = [[f"config={file}", *args] for file in options.configs] or [list(args)]
    again = [arg for arg in sys.argv[1:] if arg.partition("=")[0].lstrip("-") not in _ONCE]
    is_array = bool(options.configs)
    launch = prepare(options, requests, lambda _: again, is_array=is_array)
    for job in launch.jobs:
        if job.complete:
            print(f"{job.name} is complete: {job.dump_dir}", file=sys.stderr)
    if not launch.todo:
        return EXIT_DONE
    if options.dry_run:
        print(launch.script, end="", flush=True)
        print(summary(launch.options, launch.todo, [], launch.array_dir), file=sys.stderr)
        print(launch.starts or "not tried: there is no sbatch here", file=sys.stderr)
    elif options.launcher == "bash":
        _become(_write(launch))
    else:
        ids = submit_launch(launch)
        print(summary(launch.options, launch.todo, ids, launch.array_dir), flush=True)
    return EXIT_DONE


# ------------------------------------------------------------------ check


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
    check_options(options)
    if options.launcher == "bash":
        options = _inside_allocation(options)
    options = on_nodes(options)
    options, setup = apply_site(options, load_site(options.site), os.environ)
    check_options(options)  # again, with what the site and its variable have added
    jobs = [check_job(options, args, afresh=options.override) for args in requests]
    _check_distinct(jobs)
    for job in jobs:
        check_path(job.dump_dir, "dump_dir")
        check_name(job.name)
        check_folder(job.dump_dir, options)
        # Without SLURM the script can be looked at all the same.
        if not options.dry_run or has_sbatch():
            _check_idle(job)
    cpus = max(fit(options, job).cpus_per_node or 1 for job in jobs)
    options = replace(options, cpus_per_node=cpus)
    todo = [job for job in jobs if not job.complete]
    if not todo:
        return Launch(options, setup, jobs, todo)
    if is_array:
        array_dir = _array_dir(options, todo[0])
        check_path(array_dir, "array_dir")
    else:
        array_dir = None
    script = batch_script(
        options,
        [job.dump_dir for job in todo],
        command=f"cd {shlex.quote(os.getcwd())} && {_COMMAND} {shlex.join(again(todo))}",
        name=todo[0].name,
        setup=setup,
        array_dir=array_dir,
        no_kill=any(fewest_nodes(options, job) < options.nodes for job in todo),
    )
    starts = ""
    if options.launcher == "sbatch" and (has_sbatch() or not options.dry_run):
        starts = try_script(script, options)
    return Launch(options, setup, jobs, todo, array_dir, script, starts)


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
    for job in jobs:
        if job.dump_dir in seen:
            raise ConfigError(f"dump_dir={job.dump_dir}: two of the configs have it; give each one")
        seen.add(job.dump_dir)


def _check_idle(job: Job) -> None:
    if active := active_job(job.dump_dir):
        raise ConfigError(
            f"dump_dir={job.dump_dir}: job {active.job_id} is there already, {active.state}; wait "
            f"for it, or end it: scancel {active.job_id}"
        )


def _array_dir(options: LaunchConfig, first: Job) -> Path:
    if options.array_dir:
        return Path(options.array_dir).expanduser().resolve()
    return first.dump_dir.parent / f"array_{first.dump_dir.name}"


# ------------------------------------------------------------------ write, submit


def submit_launch(launch: Launch) -> list[str]:
    """Write what the jobs need and submit them; returns the id of each of `todo`.

    Raises UserFacingError; folders that are new are removed again where SLURM refuses the job, or
    where the disk is full.
    """
    new = [job.dump_dir for job in launch.todo if not is_ours(job.dump_dir)]
    try:
        number = submit(_write(launch), launch.options)
    except UserFacingError:
        for folder in new:
            remove_run(folder)
        raise
    count = range(len(launch.todo))
    ids = [number] if launch.array_dir is None else [f"{number}_{i}" for i in count]
    for job, job_id in zip(launch.todo, ids, strict=True):
        record_job(job.dump_dir, job_id)
    return ids


def _write(launch: Launch) -> Path:
    """Write the folders of all jobs, and the script, whose path is returned.

    Raises ConfigError, before that, if a process trains in one of them.
    """
    for job in launch.todo:
        check_unused(job.dump_dir)
    if launch.options.override:
        for job in launch.todo:
            confirm_override(job.dump_dir, launch.options)
        for job in launch.todo:
            remove_run(job.dump_dir)
    for job in launch.todo:
        write_job(job, _plan(launch, job))
    return write_script(launch.script, launch.array_dir or launch.todo[0].dump_dir)


def _plan(launch: Launch, job: Job) -> JobPlan:
    c = launch.options
    assert c.cpus_per_node is not None
    return JobPlan(
        script=job.script,
        arguments=[f"config={job.dump_dir}/base_config.yaml"],
        dump_dir=str(job.dump_dir),
        code=str(RunFolder(job.dump_dir).code),
        nodes=c.nodes,
        cpus_per_node=c.cpus_per_node,
        gpus_per_node=c.gpus_per_node or 0,
        requeue=c.requeue,
        min_nodes=fewest_nodes(c, job),
        start_timeout_s=launch.setup.start_timeout_s,
        port_range=launch.setup.port_range,
        temp_root=launch.setup.temp_root,
        container=c.container or "",
    )


def _become(script: Path) -> NoReturn:
    """Go on as the batch script: signals and the exit code are its own."""
    sys.stdout.flush()
    os.execvp("bash", ["bash", str(script)])


# ------------------------------------------------------------------ from Python


def _launch_from_python(
    configs: Sequence[str | Path | Mapping[str, Any]],
    overrides: Sequence[str],
    options: dict[str, Any],
    *,
    is_array: bool,
) -> list[str | None]:
    own = from_dict(LaunchConfig, options)
    if own.launcher == "bash" or own.dry_run or own.configs:
        raise ConfigError("launcher=bash, dry_run and configs are for the command line")
    with _as_files(configs) as files:
        requests = [[f"config={file}", *overrides] for file in files]
        launch = prepare(own, requests, lambda jobs: _again(jobs, options), is_array=is_array)
    ids = submit_launch(launch) if launch.todo else []
    found = {job.dump_dir: job_id for job, job_id in zip(launch.todo, ids, strict=True)}
    return [found.get(job.dump_dir) for job in launch.jobs]


def _again(jobs: Sequence[Job], options: Mapping[str, Any]) -> list[str]:
    """The command line that does the same with the configs that are in the jobs' folders."""
    configs = [f"{job.dump_dir}/base_config.yaml" for job in jobs]
    config = f"config={configs[0]}" if len(jobs) == 1 else f"configs=[{','.join(configs)}]"
    given = {name: value for name, value in options.items() if name not in _ONCE}
    return [config, *(f"{name}={_shown(value)}" for name, value in given.items())]


def _shown(value: Any) -> str:
    if isinstance(value, list | tuple):
        return f"[{','.join(map(str, value))}]"
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


@contextlib.contextmanager
def _as_files(configs: Sequence[str | Path | Mapping[str, Any]]) -> Iterator[list[str]]:
    """The configs as YAML files, those that are given by their content for a while."""
    with tempfile.TemporaryDirectory(prefix="modular-lm-") as scratch:
        files = []
        for number, config in enumerate(configs):
            if isinstance(config, Mapping):
                file = Path(scratch) / f"{number}.yaml"
                file.write_text(to_yaml(dict(config)), encoding="utf-8")
                config = file
            files.append(str(config))
        yield files


def command_line(args: Sequence[str]) -> NoReturn:
    """`python -m cluster.slurm` with these arguments."""
    mine, others = split_arguments(args)
    run_job(
        LaunchConfig,
        lambda options, _: main(options, others),
        what=__doc__ or "",
        usage=USAGE,
        args=mine,
    )


if __name__ == "__main__":
    command_line(sys.argv[1:])
