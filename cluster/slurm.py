"""Submit a job to SLURM: check its config, make its folder, copy the code, write the batch script.

The launcher's own keys are listed here; every other key belongs to the config of the job
(`python -m ray_jobs.train --help`). Nothing is written before all is checked. The same command
resumes a run that has stopped. From Python `launch_job` does the same. What runs inside the job is
`cluster.allocation`.
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from cluster.checks import Job, fewest_nodes
from cluster.folders import (
    check_unused,
    confirm_override,
    found_in,
    is_ours,
    remove_run,
    write_job,
    write_script,
)
from cluster.jobs import record_job, submit
from cluster.launch import Launch, prepare
from cluster.options import LaunchConfig, split_arguments
from cluster.plan import JobPlan
from cluster.summary import summary
from modular_lm.cli import run_job
from modular_lm.config import to_yaml
from modular_lm.config.load import from_dict
from modular_lm.errors import EXIT_DONE, ConfigError, UserFacingError
from modular_lm.tracking.run_folder import RunFolder

USAGE = "python -m cluster.slurm config=configs/debug.yaml nodes=2 time=1:00:00 key=value ..."
# Not in the command that resumes: with override it would delete the run that it is to go on with.
_ONCE = ("dry_run", "yes", "override")
# Jobs that would train something even without a config: the defaults, which nobody means.
_OF_A_CONFIG = ("ray_jobs.train", "ray_jobs.sweep")


def launch_job(
    config: str | Path | Mapping[str, Any], overrides: Sequence[str] = (), **options: Any
) -> str | None:
    """Submit one job, as the command line does; returns its id, None if the run is complete.

    config: a YAML file, or its content; overrides: `key=value` for the job's config; options: the
    launcher's own keys (`LaunchConfig`), but for `dry_run`, `configs` and `launcher=bash`. Raises
    UserFacingError before anything is written.
    """
    return _launch_from_python([config], overrides, options, is_array=False)[0]


def launch_jobs(
    configs: Sequence[str | Path | Mapping[str, Any]],
    overrides: Sequence[str] = (),
    **options: Any,
) -> list[str | None]:
    """Submit several jobs as one job array: see `launch_job`. The id of each, in their order; of a
    run at which a job is already, the id of that."""
    if isinstance(configs, str | Path | Mapping) or not configs:
        raise ConfigError(f"configs={configs!r}: expected a list of at least one config")
    return _launch_from_python(configs, overrides, options, is_array=True)


def main(options: LaunchConfig, args: Sequence[str]) -> int:
    """The command line, whose `args` are those for the job's config. Returns the exit code."""
    _check_config(options, args)
    requests = [[f"config={file}", *args] for file in options.configs] or [list(args)]
    again = [arg for arg in sys.argv[1:] if arg.partition("=")[0].lstrip("-") not in _ONCE]
    is_array = bool(options.configs)
    launch = prepare(options, requests, lambda _: again, is_array=is_array)
    for job in launch.jobs:
        if there := launch.active.get(job.dump_dir):
            said = f"job {there.job_id} is there already, {there.state}; left out"
            print(f"{job.name}: {said}", file=sys.stderr)
        elif job.complete:
            print(f"{job.name} is complete: {job.dump_dir}", file=sys.stderr)
    if not launch.todo:
        return EXIT_DONE
    if options.dry_run:
        _show(launch)
    elif options.launcher == "bash":
        _become(_write(launch))
    else:
        ids = submit_launch(launch)
        print(summary(launch.options, launch.todo, ids, launch.array_dir), flush=True)
    return EXIT_DONE


def _check_config(options: LaunchConfig, args: Sequence[str]) -> None:
    given = [arg for arg in args if arg.startswith("config=")]
    if given and options.configs:
        raise ConfigError(f"{given[0]} and configs={','.join(options.configs)}: use one of them")
    if not given and not options.configs and options.script in _OF_A_CONFIG:
        raise ConfigError(f"config: {options.script} needs one; give config=FILE or configs=[...]")


def _show(launch: Launch) -> None:
    """For dry_run: the script on standard output, the rest on standard error."""
    print(launch.script, end="", flush=True)
    print(summary(launch.options, launch.todo, [], launch.array_dir), file=sys.stderr)
    for job in launch.todo:
        if launch.options.override and is_ours(job.dump_dir):
            what = found_in(job.dump_dir)
            print(f"would delete the run in {job.dump_dir} ({what})", file=sys.stderr)
    print(launch.starts or "not tried: there is no sbatch here", file=sys.stderr)


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
    if isinstance(overrides, str):
        raise ConfigError(f"overrides={overrides!r}: expected a list: [{overrides!r}]")
    if mine := split_arguments(overrides)[0]:
        raise ConfigError(f"{mine[0]}: is an option of the launcher; give it as a keyword argument")
    if given := [arg for arg in overrides if arg.startswith("config=")]:
        raise ConfigError(f"{given[0]}: the config is the first argument")
    own = from_dict(LaunchConfig, options)
    if own.launcher == "bash" or own.dry_run or own.configs:
        raise ConfigError("launcher=bash, dry_run and configs are for the command line")
    with _as_files(configs) as files:
        requests = [[f"config={file}", *overrides] for file in files]
        launch = prepare(own, requests, lambda jobs: _again(jobs, options), is_array=is_array)
    ids = submit_launch(launch) if launch.todo else []
    found = {folder: there.job_id for folder, there in launch.active.items()}
    found |= {job.dump_dir: job_id for job, job_id in zip(launch.todo, ids, strict=True)}
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
