"""What the first node's process does about signals, and how it puts its job back into the queue."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest

from cluster import allocation
from cluster._causes import cause_of_loss
from cluster._shared_files import SharedFiles
from cluster.allocation import _Event, _Job, _on_node
from cluster.plan import JobPlan
from cluster.scheduler import Allocation, JobStatus
from modular_lm.errors import EXIT_STOPPED, RunFailedError

HERE = Allocation("7", 0, ("n0", "n1"))


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> _Job:
    """One that has not started anything; SLURM answers once."""
    answers = iter([JobStatus("RUNNING", False, 1000.0)])

    def status(_: Allocation, ends_in: float | None = None) -> JobStatus:
        return next(answers, JobStatus("UNKNOWN", False, ends_in))

    monkeypatch.setattr(allocation, "job_status", status)
    monkeypatch.setattr(allocation, "kill_wait", lambda: 30.0)
    monkeypatch.setattr(allocation, "_REQUEUE_PAUSE_S", 0.01)
    monkeypatch.setattr(allocation, "_REQUEUED_S", 0.01)
    plan = JobPlan("ray_jobs.prepare", [], str(tmp_path), "", nodes=2, cpus_per_node=2)
    return _Job(plan, tmp_path / "plan.json", HERE, SharedFiles(tmp_path, "7-0"))


def left(job: _Job) -> float:
    return job._deadline - time.monotonic()


def test_the_end_that_was_known_holds_where_slurm_does_not_answer(job: _Job) -> None:
    job._take(_Event(signal=signal.SIGUSR1))
    assert job.is_to_go_on
    assert 900 < left(job) < 1000


def test_who_asked_for_the_end_gets_no_requeue_for_a_lost_node(job: _Job) -> None:
    job._take(_Event(signal=signal.SIGINT))
    job._stop(cause_of_loss("a node is lost"))
    assert not job.is_to_go_on
    assert left(job) < 31


def test_a_job_that_is_stopped_before_ray_is_up_says_so(
    job: _Job, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def launch(*_: object) -> None:
        job._events.put(_Event(signal=signal.SIGTERM))

    monkeypatch.setattr(job._nodes, "launch", launch)
    monkeypatch.setattr(job._nodes, "bring_up", lambda pump: pump(1))
    with caplog.at_level("INFO"):
        assert job._start_and_drive() == EXIT_STOPPED
    said = "SLURM job 7: stopped before Ray was up; the same command continues"
    assert caplog.messages[-1] == said


def test_a_second_interrupt_does_not_wait(job: _Job) -> None:
    job._take(_Event(signal=signal.SIGINT))
    assert left(job) > 900
    job._take(_Event(signal=signal.SIGINT))
    assert left(job) <= 0


@pytest.mark.parametrize(("failures", "asked"), [(0, 1), (2, 3), (99, 5)])
def test_a_requeue_without_an_answer_is_tried_again(
    job: _Job,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    failures: int,
    asked: int,
) -> None:
    tries = []

    def requeue(which: Allocation) -> None:
        tries.append(which)
        if len(tries) <= failures:
            raise RunFailedError("scontrol requeue 7: no answer in 20 s")

    monkeypatch.setattr(allocation, "requeue", requeue)
    job._stop(cause_of_loss("a node is lost"))
    assert job.requeued() == EXIT_STOPPED
    assert len(tries) == asked
    gave_up = "no answer in 20 s; submit the job again to continue" in capsys.readouterr().out
    assert gave_up == (failures > 5)


def test_a_requeue_that_was_understood_after_all_is_not_asked_for_again(
    job: _Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries = []

    def requeue(which: Allocation) -> None:
        tries.append(which)
        job._events.put(_Event(signal=signal.SIGTERM))
        raise RunFailedError("scontrol requeue 7: no answer in 20 s")

    monkeypatch.setattr(allocation, "requeue", requeue)
    job._stop(cause_of_loss("a node is lost"))
    assert job.requeued() == EXIT_STOPPED
    assert len(tries) == 1


def test_the_process_moves_into_the_container_on_the_first_node(tmp_path: Path) -> None:
    plan = JobPlan("s", [], "/run", "", nodes=1, cpus_per_node=1, container="apptainer exec i.sif")
    command = _on_node("n0", plan, tmp_path / "plan.json")
    assert command[0] == "srun"
    assert {"--nodelist=n0", "--disable-status"} <= set(command)
    inside = ["apptainer", "exec", "i.sif", "python3", "-m", "cluster.allocation"]
    assert command[-7:-1] == inside
