"""Why a job is to end before its work is done, how long that may take, and what follows from it.

Decisions only, as functions of what is known: who sends signals and who acts is in `allocation`.
"""

from __future__ import annotations

import json
import signal
from dataclasses import dataclass
from pathlib import Path

from cluster.plan import JobPlan
from cluster.scheduler import Allocation, JobStatus
from modular_lm.errors import EXIT_BAD_INPUT, EXIT_DONE, EXIT_FAILED, EXIT_STOPPED
from modular_lm.files import write_text_atomic
from modular_lm.tracking.run_folder import RunFolder

_WITHOUT_END_S = 3600.0
# Of the time that is left, for taking Ray down and requeueing.
_TEARDOWN_SHARE, _TEARDOWN_S = 0.4, 30.0
# Jobs whose progress is checkpoints in event logs.
_SAVING = ("ray_jobs.train", "ray_jobs.sweep")
_LOSS_PATIENCE_S, _HEAD_PATIENCE_S = 30.0, 10.0


@dataclass(frozen=True)
class Cause:
    """reason: what the run's event log says; requeue: whether the job is to go on later by itself;
    driver_s: seconds that the driver may take to end; teardown_s: seconds for all that follows."""

    reason: str
    requeue: bool
    driver_s: float
    teardown_s: float


def cause_of_signal(
    number: int, allocation: Allocation, status: JobStatus, kill_wait_s: float
) -> Cause:
    """What a signal means for a job that stands so.

    SIGUSR1 (or SIGUSR2) is sent ahead of the time limit, by some sites ahead of a preemption;
    SIGTERM at the start of a preemption's grace time, or when SLURM ends the job for good, or by
    a user; SIGINT by a user at a terminal.
    """
    name = signal.Signals(number).name
    ending = status.state != "RUNNING"
    left = kill_wait_s if ending else status.ends_in
    if left is None:
        left = _WITHOUT_END_S
    left = max(0.0, left)
    teardown = min(_TEARDOWN_S, _TEARDOWN_SHARE * left)
    if ending:
        what, requeue = "is ended by SLURM", False
    elif status.preempted:
        what, requeue = "is preempted", True
    elif number in (signal.SIGUSR1, signal.SIGUSR2):
        what, requeue = "is near its time limit", True
    else:
        what, requeue = "is asked to stop", False
    return Cause(f"{allocation} {what} ({name})", requeue, left - teardown, teardown)


def cause_of_loss(why: str, *, is_head: bool = False) -> Cause:
    """Too few nodes are left, or the head is not: hardly anything can be saved any more."""
    return Cause(why, True, _HEAD_PATIENCE_S if is_head else _LOSS_PATIENCE_S, _TEARDOWN_S)


def exit_code(driver: int, cause: Cause | None, lost: bool) -> int:
    """The job's exit code; driver: the exit code of its process, negative for a signal.

    lost: whether a node was lost. A driver that fails while its nodes go, or that did not end in
    time, counts as stopped: the same command continues.
    """
    if driver in (EXIT_DONE, EXIT_BAD_INPUT, EXIT_STOPPED):
        return driver
    return EXIT_STOPPED if cause is not None or lost else EXIT_FAILED


def checkpoints_recorded(dump_dir: Path) -> int:
    """How many checkpoints the event logs here, and of runs below, tell of."""
    levels = ("", "*/", "*/*/")
    logs = [log for level in levels for log in dump_dir.glob(f"{level}events.jsonl")]
    saved = [
        {e["step"] for e in RunFolder(log.parent).events() if e.get("event") == "checkpoint"}
        for log in logs
    ]
    return sum(len(steps) for steps in saved)


def why_not_requeue(plan: JobPlan, allocation: Allocation) -> str | None:
    """None if the job may be requeued, which is recorded; else why not.

    A job that has been requeued before and has saved nothing since would go on like that for ever.
    """
    if plan.script not in _SAVING:
        return None
    dump_dir = Path(plan.dump_dir)
    file = dump_dir / "ray" / "slurm" / "requeued.json"
    saved = checkpoints_recorded(dump_dir)
    before = _read(file)
    if before.get("job") == allocation.job and saved <= before["saved"]:
        return (
            f"{allocation} was requeued before and has saved no checkpoint since: it ends here. "
            "Save more often (checkpoint.dump.every), or give it more time (time, signal)"
        )
    write_text_atomic(file, json.dumps({"job": allocation.job, "saved": saved}) + "\n")
    return None


def _read(file: Path) -> dict:
    try:
        return json.loads(file.read_text())
    except (FileNotFoundError, ValueError):
        return {}
