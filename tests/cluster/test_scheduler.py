"""What is read from SLURM's answers, and from the environment that it gives to a job."""

from __future__ import annotations

import os
from datetime import datetime
from pathlib import Path

import pytest

from cluster import scheduler
from cluster.scheduler import Allocation, JobStatus, number_of, parse_status, this_allocation
from modular_lm.errors import ConfigError, RunFailedError

# As printed by SLURM 22.05, shortened.
RUNNING = (
    "JobId=6 JobName=train UserId=root(0) Nice=0 JobState=RUNNING Reason=None Dependency=(null) "
    "Requeue=1 Restarts=2 BatchFlag=1 ExitCode=0:0 RunTime=00:00:03 StartTime=2026-11-29T12:36:54 "
    "EndTime=2026-11-29T12:41:54 Deadline=N/A PreemptEligibleTime=2026-11-29T12:36:54 "
    "PreemptTime=None SuspendTime=None NodeList=n[0-1] BatchHost=n0\n"
)
NOW = datetime.fromisoformat("2026-11-29T12:40:54").timestamp()


def test_a_running_job_has_an_end() -> None:
    assert parse_status(RUNNING, NOW) == JobStatus("RUNNING", False, 60.0, 2, "n[0-1]", True)
    endless = RUNNING.replace("EndTime=2026-11-29T12:41:54", "EndTime=Unknown")
    assert parse_status(endless, NOW).ends_in is None


def test_a_preempted_job_is_told_from_one_that_may_be() -> None:
    preempted = RUNNING.replace("PreemptTime=None", "PreemptTime=2026-11-29T12:40:50")
    assert parse_status(preempted, NOW).preempted


def test_an_answer_that_is_none_is_unknown() -> None:
    assert parse_status("", NOW) == JobStatus("UNKNOWN", False, None)


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder whose commands come first."""
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    return tmp_path


def put(folder: Path, name: str, script: str) -> None:
    file = folder / name
    file.write_text(f"#!/bin/sh\n{script}\n")
    file.chmod(0o755)


def test_a_task_of_an_array_is_never_its_array(commands: Path) -> None:
    put(commands, "scontrol", 'echo "$@" >&2; printf "n0\\nn1\\n"')
    base = {"SLURM_JOB_ID": "120", "SLURM_JOB_NODELIST": "n[0-1]"}
    assert this_allocation(base) == Allocation("120", 0, ("n0", "n1"))
    task = {"SLURM_ARRAY_JOB_ID": "120", "SLURM_ARRAY_TASK_ID": "3", "SLURM_RESTART_COUNT": "2"}
    found = this_allocation(base | task)
    assert (found.job, found.attempt, str(found)) == ("120_3", "120_3-2", "SLURM job 120_3")
    assert number_of(found) != number_of(this_allocation(base))


def test_outside_of_a_job_is_a_mistake_of_one_line() -> None:
    with pytest.raises(ConfigError, match="SLURM_JOB_ID is not set"):
        this_allocation({})


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        ("NodeName=n1 NodeAddr=127.0.0.3 NodeHostName=host", "127.0.0.3"),
        ("NodeName=n1 NodeAddr=n1 NodeHostName=n1", "10.1.2.3"),
        ("", "10.1.2.3"),
    ],
)
def test_the_address_of_a_node(commands: Path, shown: str, expected: str) -> None:
    put(commands, "scontrol", f'echo "{shown}"')
    put(commands, "hostname", 'echo "10.1.2.3 192.168.0.1 "')
    assert scheduler.node_address("n1") == expected


def test_a_controller_that_is_away_ends_nothing(commands: Path) -> None:
    put(commands, "scontrol", "echo 'slurm_load_jobs error: Unable to contact' >&2; exit 1")
    allocation = Allocation("7", 0, ("n0",))
    assert scheduler.job_status(allocation, 90.0) == JobStatus("UNKNOWN", False, 90.0)
    assert scheduler.kill_wait() == 30
    with pytest.raises(RunFailedError, match="scontrol requeue 7: slurm_load_jobs error"):
        scheduler.requeue(allocation)
