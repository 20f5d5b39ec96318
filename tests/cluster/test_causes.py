"""What a signal means, how long there is, and how a job ends."""

from __future__ import annotations

import signal
from dataclasses import replace
from pathlib import Path

import pytest

from cluster._causes import (
    Cause,
    cause_of_loss,
    cause_of_signal,
    checkpoints_recorded,
    combined,
    exit_code,
    why_not_requeue,
)
from cluster.plan import JobPlan
from cluster.scheduler import Allocation, JobStatus
from modular_lm.tracking.run_folder import RunFolder

JOB = Allocation("12", 0, ("n0", "n1"))
RUNNING = JobStatus("RUNNING", False, 90.0)
PREEMPTED = JobStatus("RUNNING", True, 90.0)
# What SLURM says while the SIGCONT before the signal is under way.
SIGNALING = JobStatus("SIGNALING", False, 90.0)
ENDING = JobStatus("COMPLETING", False, -3.0)
UNKNOWN = JobStatus("UNKNOWN", False, 200.0)
KILL_WAIT = 30.0


@pytest.mark.parametrize(
    ("number", "status", "reason", "requeue"),
    [
        (signal.SIGUSR1, RUNNING, "SLURM job 12 is near its time limit (SIGUSR1)", True),
        (signal.SIGUSR1, PREEMPTED, "SLURM job 12 is preempted (SIGUSR1)", True),
        (signal.SIGUSR2, RUNNING, "SLURM job 12 is near its time limit (SIGUSR2)", True),
        (signal.SIGTERM, PREEMPTED, "SLURM job 12 is preempted (SIGTERM)", True),
        (signal.SIGTERM, RUNNING, "SLURM job 12 is asked to stop (SIGTERM)", False),
        (signal.SIGINT, RUNNING, "SLURM job 12 is asked to stop (SIGINT)", False),
        (signal.SIGUSR1, SIGNALING, "SLURM job 12 is near its time limit (SIGUSR1)", True),
        (
            signal.SIGTERM,
            replace(SIGNALING, preempted=True),
            "SLURM job 12 is preempted (SIGTERM)",
            True,
        ),
        (signal.SIGTERM, SIGNALING, "SLURM job 12 is asked to stop (SIGTERM)", False),
        (signal.SIGTERM, ENDING, "SLURM job 12 is ended by SLURM (SIGTERM)", False),
        (
            signal.SIGTERM,
            UNKNOWN,
            "SLURM job 12 is ended by SLURM (SIGTERM)",
            False,
        ),
        (signal.SIGUSR1, UNKNOWN, "SLURM job 12 is near its time limit (SIGUSR1)", True),
        (signal.SIGINT, UNKNOWN, "SLURM job 12 is asked to stop (SIGINT)", False),
    ],
)
def test_what_a_signal_means(number: int, status: JobStatus, reason: str, requeue: bool) -> None:
    cause = cause_of_signal(number, JOB, status, KILL_WAIT)
    assert (cause.reason, cause.requeue) == (reason, requeue)
    left = KILL_WAIT if "is ended by SLURM" in reason else status.ends_in
    assert left is not None
    # Saving and taking down fit into the time that there is.
    assert 0 < cause.teardown_s < left
    assert cause.driver_s + cause.teardown_s == pytest.approx(left)


def test_a_job_without_a_time_limit_waits_but_not_for_ever() -> None:
    cause = cause_of_signal(signal.SIGUSR1, JOB, JobStatus("RUNNING", False, None), KILL_WAIT)
    assert 600 < cause.driver_s < 7200


def test_an_end_that_was_known_once_and_has_passed_leaves_time_to_save() -> None:
    cause = cause_of_signal(signal.SIGUSR1, JOB, JobStatus("UNKNOWN", False, -5.0), KILL_WAIT)
    assert cause.requeue
    assert cause.driver_s > 10


STOP = Cause("", True, 1, 1)


def test_a_later_cause_may_forbid_the_requeue_and_never_brings_it_back() -> None:
    asked, lost = Cause("asked", False, 60, 30), Cause("lost", True, 30, 20)
    assert combined(asked, lost, is_sooner=True) == Cause("lost", False, 30, 20)
    assert combined(lost, asked, is_sooner=False) == Cause("lost", False, 30, 20)
    assert combined(lost, STOP, is_sooner=True) == STOP


@pytest.mark.parametrize(
    ("driver", "cause", "lost", "code"),
    [
        (0, None, False, 0),
        (0, STOP, True, 0),
        (1, None, False, 1),
        (1, STOP, False, 3),
        (1, None, True, 3),
        (2, STOP, True, 2),
        (3, None, False, 3),
        (-9, None, False, 1),
        (-9, STOP, False, 3),
        (-15, cause_of_loss("gone"), True, 3),
    ],
)
def test_the_exit_code_of_a_job(driver: int, cause: Cause | None, lost: bool, code: int) -> None:
    assert exit_code(driver, cause, lost) == code


def plan_in(folder: Path, script: str) -> JobPlan:
    (folder / "ray" / "slurm").mkdir(parents=True)
    return JobPlan(script, [], str(folder), "", nodes=2, cpus_per_node=2)


def test_a_second_requeue_needs_a_new_checkpoint(tmp_path: Path) -> None:
    plan = plan_in(tmp_path, "ray_jobs.train")
    assert why_not_requeue(plan, JOB, at_limit=True) is None
    # Not even begun.
    assert "has saved no checkpoint since" in (why_not_requeue(plan, JOB, at_limit=False) or "")
    run = RunFolder(tmp_path)
    run.append_event("attempt")
    assert "has saved no checkpoint since" in (why_not_requeue(plan, JOB, at_limit=True) or "")
    run.append_event("checkpoint", step=10)
    assert why_not_requeue(plan, JOB, at_limit=False) is None
    # A checkpoint that is reported twice is one.
    run.append_event("checkpoint", step=10)
    assert why_not_requeue(plan, JOB, at_limit=True) is not None
    # Another submission starts afresh.
    assert why_not_requeue(plan, Allocation("13", 0, ("n0",)), at_limit=True) is None


def test_checkpoints_of_a_sweep_are_those_of_its_runs(tmp_path: Path) -> None:
    assert checkpoints_recorded(tmp_path) == 0
    for name, steps in {"a": (10,), "trials/b": (10, 20)}.items():
        run = RunFolder(tmp_path / name)
        run.path.mkdir(parents=True)
        for step in steps:
            run.append_event("checkpoint", step=step)
    assert checkpoints_recorded(tmp_path) == 3


def test_a_job_that_begins_anew_is_not_requeued_for_ever_at_its_time_limit(tmp_path: Path) -> None:
    plan = plan_in(tmp_path, "ray_jobs.convert")
    for _ in range(2):
        assert why_not_requeue(plan, JOB, at_limit=False) is None
    assert why_not_requeue(plan, JOB, at_limit=True) is None
    assert why_not_requeue(plan, JOB, at_limit=False) is None
    assert "its time was too short twice" in (why_not_requeue(plan, JOB, at_limit=True) or "")
    assert why_not_requeue(plan, Allocation("13", 0, ("n0",)), at_limit=True) is None


def test_a_job_that_goes_on_with_what_it_finished_may_be_requeued_again(tmp_path: Path) -> None:
    plan = plan_in(tmp_path, "ray_jobs.prepare")
    assert why_not_requeue(plan, JOB, at_limit=True) is None
    assert why_not_requeue(plan, JOB, at_limit=True) is None
