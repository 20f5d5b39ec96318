"""What the nodes that are left do when the first one is gone."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from cluster import _orphans
from cluster._shared_files import SharedFiles
from cluster.plan import JobPlan
from cluster.scheduler import Allocation, JobStatus
from modular_lm.errors import RunFailedError

JOB = Allocation("7", 1, ("n0", "n1", "n2"))
WITHOUT_FIRST = JobStatus("RUNNING", False, 90.0, 1, "n1 n2", True)


class Controller:
    """Answers with these statuses, the last one for ever, and keeps what it is asked to do."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *statuses: JobStatus) -> None:
        self.statuses, self.done = list(statuses), []
        monkeypatch.setattr(_orphans, "job_status", lambda _: self._next())
        monkeypatch.setattr(_orphans, "hostnames", str.split)
        monkeypatch.setattr(_orphans, "requeue", lambda _: self.done.append("requeue"))
        monkeypatch.setattr(_orphans, "cancel", lambda _: self.done.append("cancel"))
        monkeypatch.setattr(_orphans.time, "sleep", lambda _: None)

    def _next(self) -> JobStatus:
        return self.statuses.pop(0) if len(self.statuses) > 1 else self.statuses[0]


@pytest.fixture
def plan(tmp_path: Path) -> JobPlan:
    (tmp_path / "logs").mkdir()
    (tmp_path / "ray" / "slurm").mkdir(parents=True)
    SharedFiles(tmp_path, JOB.attempt).create()
    return JobPlan("ray_jobs.train", [], str(tmp_path), "", nodes=3, cpus_per_node=2)


def go_on(plan: JobPlan, node: str) -> None:
    _orphans.go_on_without_first_node(plan, JOB, SharedFiles(plan.dump_dir, JOB.attempt), node)


def said(plan: JobPlan) -> str:
    log = Path(plan.dump_dir) / "logs" / "slurm-7.out"
    return log.read_text() if log.exists() else ""


def test_it_waits_until_slurm_has_noticed(plan: JobPlan, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, silent = replace(WITHOUT_FIRST, node_list="n0 n1 n2"), JobStatus("UNKNOWN", False, None)
    signaling = replace(whole, state="SIGNALING")
    slurm = Controller(monkeypatch, whole, silent, signaling, WITHOUT_FIRST)
    go_on(plan, "n1")
    assert slurm.done == ["requeue"]
    assert said(plan) == "SLURM job 7 has lost its first node, n0: requeued by n1\n"


def test_also_where_the_job_fails_with_it(plan: JobPlan, monkeypatch: pytest.MonkeyPatch) -> None:
    slurm = Controller(monkeypatch, replace(WITHOUT_FIRST, state="FAILED"))
    go_on(plan, "n1")
    assert slurm.done == ["requeue"]


@pytest.mark.parametrize(
    "otherwise",
    [
        {"node_list": "n0 n1 n2", "state": "FAILED"},
        {"state": "CANCELLED"},
        {"restarts": 2},
        {"node_list": "(null)", "state": "PENDING"},
        {"is_batch": False},
    ],
)
def test_a_job_that_ended_otherwise_is_left_alone(
    plan: JobPlan, monkeypatch: pytest.MonkeyPatch, otherwise: dict
) -> None:
    slurm = Controller(monkeypatch, replace(WITHOUT_FIRST, **otherwise))
    go_on(plan, "n1")
    assert slurm.done == []
    assert said(plan) == ""


def test_one_node_acts_whatever_slurm_shows_to_the_others(
    plan: JobPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The job may be as it was for a while after the requeue; a second one would look like a job
    that saves nothing, and end it."""
    slurm = Controller(monkeypatch, WITHOUT_FIRST)
    for node in ("n2", "n1"):
        go_on(plan, node)
    assert slurm.done == ["requeue"]
    assert said(plan).count("\n") == 1


def test_a_start_that_ended_in_order_is_left_alone(
    plan: JobPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    slurm = Controller(monkeypatch, WITHOUT_FIRST)
    SharedFiles(plan.dump_dir, JOB.attempt).remove()
    go_on(plan, "n1")
    assert slurm.done == []


def test_one_that_is_not_to_be_requeued_ends(
    plan: JobPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else it would hold its other nodes until its time limit."""
    slurm = Controller(monkeypatch, WITHOUT_FIRST)
    go_on(replace(plan, requeue=False), "n1")
    file = Path(plan.dump_dir) / "ray" / "slurm" / "requeued.json"
    file.write_text(json.dumps({"job": "7", "saved": 0}))
    SharedFiles(plan.dump_dir, JOB.attempt).create()
    go_on(plan, "n1")
    assert slurm.done == ["cancel", "cancel"]
    assert "n0: not requeued" in said(plan)
    assert "has saved no checkpoint since" in said(plan)


def test_what_slurm_refuses_is_in_the_jobs_log(
    plan: JobPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    Controller(monkeypatch, WITHOUT_FIRST)

    def refuse(_: Allocation) -> None:
        raise RunFailedError("scontrol requeue 7: no")

    monkeypatch.setattr(_orphans, "requeue", refuse)
    go_on(plan, "n1")
    assert "error: scontrol requeue 7: no; submit the job again" in said(plan)
