"""The text of a batch script: readable, complete in itself, safe for paths with blanks and quotes.

`#SBATCH` lines, then what sets up the environment, then one `exec`: the allocation takes the place
of the batch step's shell, so that the signals which SLURM sends to that (`--signal=B:`) reach it.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import re
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from cluster.options import LaunchConfig
from cluster.sites import NodeSetup
from modular_lm.errors import EXIT_BAD_INPUT, ConfigError

log = logging.getLogger(__name__)

# $NAME and ${NAME}, which the node replaces.
_VARIABLE = re.compile(r"\$(?:[A-Za-z_]\w*|\{[A-Za-z_]\w*\})")
# ~ and ~NAME at the beginning of a word.
_HOME = re.compile(r"(?<!\S)~[\w.-]*(?=/|\s|$)")
# SLURM takes a backslash out of a path, a colon divides PYTHONPATH, and lines end with a newline.
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_IMPOSSIBLE = re.compile(r"[\\:\x00-\x1f]")


def check_path(path: Path, key: str) -> None:
    """Raise ConfigError for a path that a batch script cannot hold."""
    if found := _IMPOSSIBLE.search(str(path)):
        raise ConfigError(
            f"{key}={str(path)!r}: SLURM cannot use a path with {found[0]!r}; choose another name"
        )


def check_name(name: str) -> None:
    """Raise ConfigError for a name that would not stay on its line of the script."""
    if _CONTROL.search(name):
        raise ConfigError(f"name={name!r}: holds a control character; choose another name")


def on_nodes(c: LaunchConfig) -> LaunchConfig:
    """The options with paths and the container's command as the nodes are to have them.

    Raises ConfigError for a virtual environment that is none.
    """
    venv, conda, container = c.venv, c.conda, c.container
    if conda is not None:
        conda = os.path.expanduser(conda)
    if venv is not None:
        venv = os.path.expanduser(venv)
        if not _VARIABLE.search(venv):  # else only the node knows where it is
            venv = os.path.abspath(venv)
            if not os.path.isfile(f"{venv}/bin/activate"):
                raise ConfigError(f"venv={venv}: holds no bin/activate; name a virtual environment")
    if container is not None:
        # The script and the allocation on the first node both begin commands with it.
        container = _HOME.sub(
            lambda word: shlex.quote(os.path.expanduser(word[0])), os.path.expandvars(container)
        )
    return dataclasses.replace(c, venv=venv, conda=conda, container=container)


def check_container(c: LaunchConfig, setup: NodeSetup) -> None:
    """Warn where the container's command is not found here, and no module can bring it: the nodes
    may have more than this machine. Raises ConfigError for one that is not well quoted."""
    if c.container is None:
        return
    first = _first_word(c.container)
    if not (setup.modules or c.module_load or "$" in first or shutil.which(first)):
        log.warning("container=%s: there is no command %s here", c.container, first)


def _first_word(container: str) -> str:
    try:
        words = shlex.split(container)
    except ValueError as error:
        raise ConfigError(f"container={container}: {error}") from None
    if not words:
        raise ConfigError("container=: expected the beginning of a command")
    return words[0]


def plan_file(dump_dir: Path) -> Path:
    """What the allocation carries out."""
    return dump_dir / "ray" / "slurm" / "plan.json"


def log_file(dump_dir: Path) -> Path:
    """The log of a job, with SLURM's pattern for its id."""
    return dump_dir / "logs" / "slurm-%j.out"


def array_log(folder: Path) -> Path:
    """The log of a task of an array until it has found its own folder."""
    return folder / "slurm-%A_%a.out"


def batch_script(
    options: LaunchConfig,
    dump_dirs: Sequence[Path],
    *,
    command: str,
    name: str,
    setup: NodeSetup,
    array_dir: Path | None = None,
    no_kill: bool = False,
) -> str:
    """The script for one job, or with `array_dir` for an array with a task per folder.

    command: how to make this script again. no_kill: the job can go on without some of its nodes,
    so SLURM is not to end and requeue it when it loses one.
    """
    if array_dir is None:
        assert len(dump_dirs) == 1
        log = log_file(dump_dirs[0])
        task = [f"dump_dir={shlex.quote(str(dump_dirs[0]))}"]
    else:
        log = array_log(array_dir)
        task = [
            "dump_dirs=(",
            *(f"    {shlex.quote(str(folder))}" for folder in dump_dirs),
            ")",
            'dump_dir="${dump_dirs[$SLURM_ARRAY_TASK_ID]}"',
            'exec >>"$dump_dir/logs/slurm-${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID.out" 2>&1',
        ]
    limit = f"%{options.array_limit}" if options.array_limit else ""
    array = [f"--array=0-{len(dump_dirs) - 1}{limit}"] if array_dir else []
    lines = [
        "#!/bin/bash",
        "# Written by the launcher, and again at every submission. To submit or to resume:",
        *(f"#   {line}" for line in command.splitlines()),
        *(
            f"#SBATCH {option}"
            for option in [*_sbatch_options(options, name, log, no_kill), *array]
        ),
        "",
        *task,
        *_set_up(options, setup),
        "",
        'cd "$dump_dir/code" || exit 1',
        f'exec {_python(options)} -m cluster.allocation "$dump_dir/ray/slurm/plan.json"',
    ]
    return "\n".join(lines) + "\n"


def expandable(text: str) -> str:
    """The text for bash, quoted, but for variables, which are replaced where it runs."""
    if not _VARIABLE.search(text):
        return shlex.quote(text)
    quoted, end = "", 0
    for match in _VARIABLE.finditer(text):
        quoted += _escaped(text[end : match.start()]) + match[0]
        end = match.end()
    return f'"{quoted}{_escaped(text[end:])}"'


def _escaped(text: str) -> str:
    return re.sub(r'([\\"$`])', r"\\\1", text)


def _sbatch_options(c: LaunchConfig, name: str, log: Path, no_kill: bool) -> list[str]:
    resources = {
        "job-name": c.job_name or name,
        "nodes": c.nodes,
        "ntasks-per-node": 1,
        "cpus-per-task": c.cpus_per_node,
        "gres": f"gpu:{c.gpus_per_node}" if c.gpus_per_node else None,
        "mem": c.mem,
        "time": c.time,
        "account": c.account,
        "qos": c.qos,
        "partition": c.partition,
        "constraint": c.constraint,
        "exclude": c.exclude,
        "output": str(log.parent).replace("%", "%%") + f"/{log.name}",
        "open-mode": "append",
        "signal": f"B:USR1@{c.signal_s}",
    }
    given = [f"--{key}={_for_sbatch(str(v))}" for key, v in resources.items() if v is not None]
    given += ["--no-kill"] if no_kill else []
    return [*given, "--requeue" if c.requeue else "--no-requeue", *c.sbatch_options]


def _for_sbatch(text: str) -> str:
    """Quoted as sbatch reads its lines: it knows quotes, and backslashes before them."""
    if re.fullmatch(r"[\w./:@%+,=&|*\[\]()-]+", text):
        return text
    return '"' + re.sub(r'(["\\])', r"\\\1", text) + '"'


def _set_up(c: LaunchConfig, setup: NodeSetup) -> list[str]:
    lines = ["module purge"] if setup.module_purge else []
    for name in (*setup.modules, *c.module_load):
        why = _or(f"module_load={name}: cannot be loaded")
        lines.append(f"module load {shlex.quote(name)} {why}")
    if c.conda:
        # Of a command that is not there the hook would be empty, and no mistake.
        why = _or(f"conda={c.conda}: there is no conda command here; load its module (module_load)")
        lines.append(f"command -v conda >/dev/null {why}")
        why = _or(f"conda={c.conda}: cannot be activated")
        lines.append(f'eval "$(conda shell.bash hook)" {why}')
        lines.append(f"conda activate {expandable(c.conda)} {why}")
    if c.venv:
        why = _or(f"venv={c.venv}: holds no bin/activate that works here")
        lines.append(f"source {expandable(c.venv.rstrip('/') + '/bin/activate')} {why}")
    if c.container:
        first = _first_word(c.container)
        why = _or(f"container={c.container}: there is no command {first} here")
        lines.append(f"command -v {shlex.quote(first)} >/dev/null {why}")
    lines += [f"export {name}={expandable(value)}" for name, value in setup.environment.items()]
    # Ray holds many connections; the soft limit is low on most machines.
    lines.append('ulimit -n "$(ulimit -Hn)"')
    return lines


def _or(why: str) -> str:
    """What ends the job, for a reason that names the option, where the command before it fails."""
    return f"|| {{ echo {shlex.quote(f'error: {why}')} >&2; exit {EXIT_BAD_INPUT}; }}"


def _python(c: LaunchConfig) -> str:
    """The interpreter: that of the environment that is set up, else the one that runs this."""
    if c.container:
        return f"{c.container} python3"
    return "python" if c.venv or c.conda or c.module_load else shlex.quote(sys.executable)
