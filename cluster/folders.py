"""What may be written where: a run's folder before and at its submission.

Files of others are never deleted; those of a run of ours only where the user asks for it.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from cluster.checks import Job
from cluster.options import LaunchConfig
from cluster.plan import JobPlan
from cluster.script import plan_file
from modular_lm.config import to_yaml
from modular_lm.errors import ConfigError, reason
from modular_lm.files import Locked, lock, write_text_atomic
from modular_lm.tracking.run_folder import RunFolder
from modular_lm.tracking.snapshot import snapshot_code
from modular_lm.train.inventory import complete_steps

SCRIPT = "submit.slurm"
# What runs and the launcher make, in the order in which it is deleted: what shows that it is ours
# comes last.
_OURS = (
    *("checkpoints", "evals", "dumps", "profiling", "probe", "logs"),
    *("code", ".code.new", ".code.old"),
    *("trials", "pictures", "report.html", "report.md", "report.json", "sweep.yaml"),
    *("metrics.jsonl", "metrics.eval.jsonl", "config.yaml", "base_config.yaml", SCRIPT),
    *("events.jsonl", "ray"),
)


def is_ours(dump_dir: Path) -> bool:
    """Whether a run of ours is there, begun or only submitted."""
    return RunFolder(dump_dir).events_file.is_file() or plan_file(dump_dir).is_file()


def check_folder(dump_dir: Path, options: LaunchConfig) -> None:
    """Raise ConfigError unless the folder is new, without files, ours, or may be shared."""
    if dump_dir.exists() and not dump_dir.is_dir():
        raise ConfigError(f"dump_dir={dump_dir}: is a file; choose a folder")
    if not dump_dir.is_dir() or is_ours(dump_dir) or options.dirs_exists_ok:
        return
    # A launch that could write no file may have left empty folders.
    files = (p for p in dump_dir.rglob("*") if p.is_symlink() or not p.is_dir())
    if (found := next(files, None)) is not None:
        raise ConfigError(
            f"dump_dir={dump_dir}: holds {found.relative_to(dump_dir)} and no run of ours; choose "
            "another folder, or use this one with dirs_exists_ok=true"
        )


def found_in(dump_dir: Path) -> str:
    """What an earlier run has left, in words."""
    steps = complete_steps(RunFolder(dump_dir).checkpoints)
    return f"{len(steps)} checkpoints, the latest of step {steps[-1]}" if steps else "no checkpoint"


def confirm_override(dump_dir: Path, options: LaunchConfig) -> None:
    """Ask before what an earlier run has left is deleted. Raises ConfigError without a yes."""
    if not is_ours(dump_dir) or options.yes:
        return
    what = found_in(dump_dir)
    if not sys.stdin.isatty():
        raise ConfigError(
            f"override=true: would delete the run in {dump_dir} ({what}); add yes=true if it may"
        )
    answer = input(f"delete the run in {dump_dir} ({what})? yes/no: ")
    if answer.strip().lower() not in ("y", "yes"):
        raise ConfigError(f"dump_dir={dump_dir}: nothing was deleted, nothing submitted")


def check_unused(dump_dir: Path) -> None:
    """Raise ConfigError if a process trains in the folder, which SLURM may know nothing of."""
    for driver in RunFolder(dump_dir).ray.glob("*.lock"):
        try:
            with lock(driver, blocking=False):
                pass
        except Locked as error:
            raise ConfigError(
                f"dump_dir={dump_dir}: is being trained by {error.holder}; wait for it, or stop it"
            ) from None


def remove_run(dump_dir: Path) -> None:
    """Delete what a run of ours has left, if there is one, and the folder if it is empty then.

    Raises ConfigError if a process trains in it.
    """
    if not is_ours(dump_dir):
        return
    check_unused(dump_dir)
    for name in _OURS:
        path = dump_dir / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    if not any(dump_dir.iterdir()):
        dump_dir.rmdir()


def write_job(job: Job, plan: JobPlan) -> None:
    """Write what the job needs into its folder: plan, code, config.

    Raises ConfigError where there can be no such folder.
    """
    folder = RunFolder(job.dump_dir)
    try:
        job.dump_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"dump_dir={job.dump_dir}: cannot be made: {reason(error)}") from error
    # First, for it shows that the folder is ours: what fails below can be done again.
    plan.write(plan_file(job.dump_dir))
    folder.create()
    snapshot_code(folder.code)
    write_text_atomic(folder.base_config, to_yaml(job.given))


def write_script(text: str, folder: Path) -> Path:
    """Write a batch script, to be read and to be submitted."""
    folder.mkdir(parents=True, exist_ok=True)
    write_text_atomic(folder / SCRIPT, text)
    return folder / SCRIPT
