"""The launcher's own keys, and how a command line is divided between them and the job's config.

What they mean in a batch script is in `script`, what a site adds to them in `sites`.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal

from modular_lm.config.schema import key
from modular_lm.errors import ConfigError

Launcher = Literal["sbatch", "bash"]

# SLURM looks at its clock once a minute, so it may send a signal that much earlier.
SIGNAL_SLACK_S = 60
# How sbatch writes a duration; days-hours or minutes are the leading numbers.
_DURATION = re.compile(r"(?:(?P<days>\d+)-)?(?P<rest>\d+(?::\d+){0,2})")

# Options of sbatch that the launcher sets, long and short, and what to use in their place.
_LAUNCHERS = (
    ("nodes", "N", "use nodes="),
    ("ntasks", "n", "use nodes="),
    ("ntasks-per-node", "", "there is one task to a node"),
    ("tasks-per-node", "", "there is one task to a node"),
    ("cpus-per-task", "c", "use cpus_per_node="),
    ("gpus", "G", "use gpus_per_node="),
    ("gpus-per-node", "", "use gpus_per_node="),
    ("gpus-per-task", "", "use gpus_per_node="),
    ("array", "a", "use configs=[...]"),
    ("job-name", "J", "use job_name="),
    ("output", "o", "the log is in dump_dir/logs"),
    ("open-mode", "", "the log is continued"),
    ("signal", "", "use signal_s="),
    ("requeue", "", "use requeue="),
    ("no-requeue", "", "use requeue=false"),
    ("no-kill", "k", "use ray.num_workers=[min,max]"),
    ("mem", "", "use mem="),
    ("time", "t", "use time="),
    ("account", "A", "use account="),
    ("qos", "q", "use qos="),
    ("partition", "p", "use partition="),
    ("constraint", "C", "use constraint="),
    ("exclude", "x", "use exclude="),
)
# Those that it sets only where the user gives the key of the same name.
IF_ASKED = ("mem", "time", "account", "qos", "partition", "constraint", "exclude")


@dataclass
class LaunchConfig:
    script: str = key("ray_jobs.train", "the job to run, as a module")
    configs: list[str] = key(
        [], "several configs instead of config=: a job array, one dump_dir for each"
    )
    array_dir: str | None = key(
        None, "folder of an array's script and log; default: array_<name of the first> beside it"
    )
    array_limit: int | None = key(None, "tasks of an array that may run at once", ge=1)
    launcher: Launcher = key("sbatch", "sbatch: submit; bash: run inside the present allocation")
    dry_run: bool = key(False, "print the batch script and what would be done; write nothing")
    dirs_exists_ok: bool = key(False, "use a dump_dir that holds files of others")
    override: bool = key(
        False, "delete what an earlier run has left in dump_dir, and begin anew; asks before"
    )
    yes: bool = key(False, "do not ask")
    site: str = key("generic", "profile of the cluster: a name in cluster/sites, or a YAML file")
    kind: str | None = key(None, "kind of node, where the site's profile knows several")
    job_name: str | None = key(None, "name in the queue; default: the run's")
    nodes: int = key(1, "nodes", ge=1)
    gpus_per_node: int | None = key(None, "GPUs per node; default: the site's, else 0", ge=0)
    cpus_per_node: int | None = key(
        None,
        "CPUs per node; default: the site's for each GPU, else what the workers need and two more",
        ge=1,
    )
    mem: str | None = key(None, "memory per node, e.g. 64G; default: SLURM's")
    time: str | None = key(
        None, "time limit: minutes, H:MM:SS, D-H, D-H:MM or D-H:MM:SS; default: SLURM's"
    )
    account: str | None = key(None, "account to charge")
    qos: str | None = key(None, "quality of service")
    partition: str | None = key(None, "partition")
    constraint: str | None = key(None, "features that the nodes must have")
    exclude: str | None = key(None, "nodes to leave out")
    sbatch_options: list[str] = key([], "further options of sbatch, e.g. --reservation=NAME")
    requeue: bool = key(
        True, "go on by itself after a time limit, a preemption or a lost node; else exit 3"
    )
    signal_s: int = key(
        300, "seconds before the time limit at which the run is to save and stop", ge=10
    )
    venv: str | None = key(None, "virtual environment to activate on the nodes")
    conda: str | None = key(None, "conda environment to activate on the nodes")
    module_load: list[str] = key([], "environment modules to load, after those of the site")
    container: str | None = key(
        None, "command that runs another one in a container, e.g. `apptainer exec --nv IMAGE`"
    )


def split_arguments(args: Sequence[str]) -> tuple[list[str], list[str]]:
    """The arguments that are the launcher's own, `--help` among them, and those of the job."""
    own = {f.name for f in fields(LaunchConfig)} | {"help", "h"}
    mine, job = [], []
    for arg in args:
        name = arg.partition("=")[0].lstrip("-")
        (mine if name in own else job).append(arg)
    return mine, job


def check_options(c: LaunchConfig) -> None:
    """Raise ConfigError where options contradict each other, or SLURM could not read them."""
    if c.venv and c.conda:
        raise ConfigError(f"venv={c.venv} and conda={c.conda}: use one of them")
    if c.launcher == "bash" and c.configs:
        raise ConfigError("configs: a job array needs launcher=sbatch")
    if c.time is not None:
        _check_time(c.time, c.signal_s)
    if c.mem is not None and c.mem.isdigit() and int(c.mem):
        raise ConfigError(f"mem={c.mem}: is {c.mem} MB for SLURM; give the unit, e.g. {c.mem}G")
    check_words(c)
    check_sbatch_options(c.sbatch_options)


def _check_time(time: str, signal_s: int) -> None:
    seconds = duration_s(time)
    if seconds == 0:
        raise ConfigError(
            f"time={time}: is no limit at all for SLURM; say how long the job may take, or leave "
            "it out for SLURM's default"
        )
    if seconds <= signal_s + SIGNAL_SLACK_S:
        raise ConfigError(
            f"signal_s={signal_s}: time={time}, which is {_in_words(seconds)}, leaves nothing to "
            f"train in; SLURM may send the signal {SIGNAL_SLACK_S} s earlier"
        )


def _in_words(seconds: int) -> str:
    minutes, rest = divmod(seconds, 60)
    parts = [f"{minutes} minute{'s' * (minutes != 1)}"] if minutes else []
    return " and ".join([*parts, f"{rest} s"] if rest else parts)


def check_words(c: LaunchConfig) -> None:
    """Raise ConfigError for values that a line of the batch script cannot hold."""
    for name in ("mem", "account", "qos", "partition", "constraint", "exclude", "job_name"):
        check_word(name, getattr(c, name))


def check_word(key: str, value: str | None) -> None:
    """Raise ConfigError for a value that is not one word of a batch script's line."""
    if value is not None and (not value or re.search(r"[\s'\"\\]", value)):
        raise ConfigError(f"{key}={value!r}: expected a word without blanks or quotes")


def check_sbatch_options(options: Sequence[str], *, of_site: bool = False) -> None:
    """Raise ConfigError for an option that is none, would not stay on its line, or is set by the
    launcher itself; of_site: it may be one that the launcher sets only where the user asks."""
    for option in options:
        own = _set_by_launcher(option, of_site)
        if "\n" in option or not (own or option.startswith("--")):
            raise ConfigError(f"sbatch_options={option!r}: expected --name or --name=value")
        if own:
            raise ConfigError(f"sbatch_options={option!r}: is set by the launcher; {own}")


def option_name(option: str) -> str:
    """The long name in an option of sbatch, without what follows: "time" of --time=3."""
    match = re.match(r"--([\w-]+)", option)
    return match[1] if match else ""


def _set_by_launcher(option: str, of_site: bool) -> str:
    """What to do instead of giving the option; "" for one that is not the launcher's.

    sbatch takes any beginning of a name that only one option has.
    """
    name, short = option_name(option), re.match(r"-(\w)", option)
    for long, letter, key_name in _LAUNCHERS:
        is_it = long.startswith(name) if name else short is not None and short[1] == letter
        if is_it and not (of_site and long in IF_ASKED):
            return key_name
    return ""


def duration_s(text: str, key: str = "time") -> int:
    """Seconds of a duration as sbatch takes it. Raises ConfigError."""
    match = _DURATION.fullmatch(text)
    if match is None:
        raise ConfigError(
            f"{key}={text}: expected minutes, H:MM:SS, D-H, D-H:MM or D-H:MM:SS, e.g. 20:00:00"
        )
    numbers = [int(part) for part in match["rest"].split(":")]
    if match["days"] is not None:
        hours, minutes, seconds = numbers + [0] * (3 - len(numbers))
        hours += 24 * int(match["days"])
    elif len(numbers) == 3:
        hours, minutes, seconds = numbers
    else:
        hours, (minutes, seconds) = 0, numbers + [0] * (2 - len(numbers))
    return 3600 * hours + 60 * minutes + seconds


def unknown(key: str, value: str, known: Sequence[str]) -> ConfigError:
    """The error for a value that is none of those that are known."""
    close = difflib.get_close_matches(value, known, n=1)
    meant = f"did you mean {close[0]}?" if close else f"there are {', '.join(known) or 'none'}"
    return ConfigError(f"{key}={value}: {meant}")
