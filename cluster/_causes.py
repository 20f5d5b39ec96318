"""Why a job is to end before its work is done, how long that may take, and what follows from it.

Decisions only, as functions of what is known: who sends signals and who acts is in `allocation`.
"""

from __future__ import annotations

import json
import signal
from dataclasses import dataclass, replace
from pathlib import Path

from cluster.plan import JobPlan
from cluster.scheduler import Allocation, JobStatus
from modular_lm.errors import EXIT_BAD_INPUT, EXIT_DONE, EXIT_FAILED, EXIT_STOPPED
from modular_lm.files import write_text_atomic
from modular_lm.tracking.run_folder import RunFolder

_WITHOUT_END_S = 3600.0
# Of the time that is left, for taking Ray down and requeueing.
_TEARDOWN_SHARE, _TEARDOWN_S = 0.4, 30.0
# Jobs whose progress is checkpoints in event logs, and those that always begin anew.
_SAVING = ("ray_jobs.train", "ray_jobs.sweep")
_BEGINNING_ANEW = ("ray_jobs.generate", "ray_jobs.convert", "ray_jobs.modules")
_LOSS_PATIENCE_S, _HEAD_PATIENCE_S = 30.0, 10.0


@dataclass(frozen=True)
class Cause:
    """reason: what the run's event log says; requeue: whether the job is to go on later by itself;
    driver_s: seconds that the driver may take to end; teardown_s: seconds for all that follows;
    at_limit: whether it is the job's time limit, which will be the same next time."""

    reason: str
    requeue: bool
    driver_s: float
    teardown_s: float
    at_limit: bool = False


def cause_of_signal(
    number: int, allocation: Allocation, status: JobStatus, kill_wait_s: float
) -> Cause:
    """What a signal means for a job that stands so.

    SIGUSR1 (or SIGUSR2) is sent ahead of the time limit, by some sites ahead of a preemption;
    SIGTERM at the start of a preemption's grace time, or when SLURM ends the job for good, or by
    a user; SIGINT by a user at a terminal. Where SLURM does not answer, the signal has to do, and
    what was known of the end before.
    """
    name = signal.Signals(number).name
    is_known = status.state != "UNKNOWN"
    ending = status.is_ending if is_known else number == signal.SIGTERM
    left = kill_wait_s if ending else status.ends_in
    if left is None:
        left = _WITHOUT_END_S
    # An end that was known before may have been put off.
    left = max(0.0 if is_known else kill_wait_s, left)
    teardown = min(_TEARDOWN_S, _TEARDOWN_SHARE * left)
    at_limit = False
    if ending:
        what, requeue = "is ended by SLURM", False
    elif status.preempted:
        what, requeue = "is preempted", True
    elif number in (signal.SIGUSR1, signal.SIGUSR2):
        what, requeue, at_limit = "is near its time limit", True, True
    else:
        what, requeue = "is asked to stop", False
    reason = f"{allocation} {what} ({name})"
    return Cause(reason, requeue, left - teardown, teardown, at_limit)


def combined(before: Cause, later: Cause, *, is_sooner: bool) -> Cause:
    """What holds after a second cause: the one that leaves less time (is_sooner: the later), and
    no requeue unless both allow it: who asked for the end wants no more of the job."""
    return replace(later if is_sooner else before, requeue=before.requeue and later.requeue)


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


def why_not_requeue(plan: JobPlan, allocation: Allocation, *, at_limit: bool) -> str | None:
    """None if the job may be requeued, which is recorded; else why not.

    A job that has been requeued before and has saved nothing since would go on like that for ever,
    and so would one that begins anew and does not fit into its time. ray_jobs.prepare is always
    requeued: it goes on with what it has finished, and the folders of that are not known here.
    """
    begins_anew = plan.script in _BEGINNING_ANEW
    if plan.script not in _SAVING and not (begins_anew and at_limit):
        return None
    dump_dir = Path(plan.dump_dir)
    file = dump_dir / "ray" / "slurm" / "requeued.json"
    saved = checkpoints_recorded(dump_dir)
    before = _read(file)
    if before.get("job") == allocation.job and saved <= before["saved"]:
        if begins_anew:
            return (
                f"{allocation} begins anew at every start, and its time was too short twice: it "
                "ends here. Give it more (time)"
            )
        return (
            f"{allocation} was requeued before and has saved no checkpoint since: it ends here. "
            "Save more often (checkpoint.dump.every), or give it more time (time, signal_s)"
        )
    write_text_atomic(file, json.dumps({"job": allocation.job, "saved": saved}) + "\n")
    return None


def _read(file: Path) -> dict:
    try:
        return json.loads(file.read_text())
    except (FileNotFoundError, ValueError):
        return {}
