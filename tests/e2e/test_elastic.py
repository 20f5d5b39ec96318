"""Nodes come and go; the run takes the size that there is room for, and does each step once.

On a Ray of the test's own whose nodes have one CPU each and loopback addresses of their own. One
CPU is kept for the data: n + 1 nodes have room for n workers.
"""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from modular_lm.tracking.run_folder import RunFolder
from tests.e2e.test_chaos import CHAOS, random_of
from tests.support import (
    TINY,
    Jobs,
    assert_each_step_once,
    end,
    finish,
    free_ports,
    listens,
    outcomes,
    wait_until,
)

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(900)]
HEAD = "127.0.0.1"


@dataclass
class Nodes:
    """A Ray whose nodes a test starts and ends."""

    folder: Path
    environment: dict[str, str]
    port: int
    running: dict[str, subprocess.Popen] = field(default_factory=dict)

    def start(self, address: str) -> None:
        """A node of one CPU; the first, the head, with the dashboard that Ray Train asks."""
        where = [f"--address={HEAD}:{self.port}"]
        if not self.running:
            (dashboard,) = free_ports(1)
            where = ["--head", f"--port={self.port}", "--dashboard-host=127.0.0.1"]
            where += [f"--dashboard-port={dashboard}", "--disable-usage-stats"]
        self.running[address] = subprocess.Popen(
            [
                *(sys.executable, "-m", "ray.scripts.scripts", "start", "--block", *where),
                *(f"--node-ip-address={address}", "--num-cpus=1"),
                *("--object-store-memory=100000000", f"--temp-dir={self.folder / address}"),
            ],
            env=self.environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        wait_until(lambda: listens(self.port), "the Ray head", 90)

    def announce_end(self, address: str) -> None:
        """SIGTERM: the node is drained, then ends."""
        self.running.pop(address).send_signal(signal.SIGTERM)

    def kill(self, address: str) -> None:
        """All of a node at once, without a word."""
        import psutil

        node = psutil.Process(self.running.pop(address).pid)
        for process in [node, *node.children(recursive=True)]:
            process.kill()


@pytest.fixture
def nodes(cache: Path) -> Iterator[Nodes]:
    (port,) = free_ports(1)
    with tempfile.TemporaryDirectory(prefix="mlme", dir="/tmp") as short:
        token = Path(short) / "token"
        token.touch(mode=0o600)
        token.write_text(secrets.token_hex(32))
        environment = {
            **os.environ,
            "RAY_AUTH_TOKEN_PATH": str(token),
            "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "30",
            "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
            "MODULAR_LM_CACHE": str(cache),
            "PYTHONUNBUFFERED": "1",
        }
        environment.pop("RAY_ADDRESS", None)
        ray = Nodes(Path(short), environment, port)
        try:
            yield ray
        finally:
            for process in reversed(ray.running.values()):
                end(process)


def start_run(nodes: Nodes, folder: RunFolder, workers: str) -> subprocess.Popen:
    """A run that does not come to its end by itself."""
    jobs = Jobs({**nodes.environment, "RAY_ADDRESS": f"{HEAD}:{nodes.port}"})
    arguments = (f"dump_dir={folder.path}", "steps=99999", f"ray.num_workers={workers}")
    return jobs.start("ray_jobs.train", *TINY, *arguments, "ray.resize_after_s=1")


def attempt(folder: RunFolder, number: int, job: subprocess.Popen) -> dict[str, Any]:
    """The event of this attempt or a later one, once it has done steps."""

    def stepped() -> dict[str, Any] | None:
        assert job.poll() is None, finish(job)
        found = folder.last_event("attempt")
        if found is None or found["attempt"] < number:
            return None
        return found if folder.last_step.read() > found["start_step"] + 2 else None

    return wait_until(stepped, f"steps of attempt {number}", 240)


def test_a_run_grows_when_a_node_comes_and_leaves_one_that_will_go(
    nodes: Nodes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    monkeypatch.setenv("MODULAR_LM_CACHE", str(cache))
    folder = RunFolder(tmp_path / "run")
    for address in (HEAD, "127.0.0.2"):
        nodes.start(address)
    job = start_run(nodes, folder, "[1,2]")
    try:
        assert attempt(folder, 1, job)["world_size"] == 1
        nodes.start("127.0.0.3")
        grown = attempt(folder, 2, job)
        assert grown["world_size"] == 2
        # The head's is not what it was told: Ray gives it the machine's own.
        leaving = next(a for a in grown["addresses"] if a in nodes.running and a != HEAD)
        nodes.announce_end(leaving)
        left = attempt(folder, 3, job)
        assert left["world_size"] == 1
        assert leaving not in left["addresses"]
        job.send_signal(signal.SIGTERM)
        finish(job, code=3)
    finally:
        end(job)
    assert outcomes(folder) == ["resized", "preempted", "stopped"]
    ends = [event for event in folder.events() if event["event"] == "attempt_end"]
    assert ends[1]["reason"] == f"{leaving} will be taken away"
    begun = [event for event in folder.events() if event["event"] == "attempt"]
    assert [event["steps_again"] for event in begun] == [0, 0, 0], "both changed at a checkpoint"
    created = folder.last_event("created")
    assert created is not None
    assert created["global_batch_size"] == 8, "of two workers"
    assert_each_step_once(folder)


@pytest.mark.chaos
@pytest.mark.parametrize("number", CHAOS)
def test_workers_follow_the_nodes(
    nodes: Nodes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path, number: int
) -> None:
    """Six times a node comes, is drained, or dies."""
    monkeypatch.setenv("MODULAR_LM_CACHE", str(cache))
    moment, folder = random_of("nodes", number), RunFolder(tmp_path / "run")
    addresses = [f"127.0.0.{n}" for n in range(2, 6)]
    for address in (HEAD, *addresses[:2]):
        nodes.start(address)
    job = start_run(nodes, folder, "[1,4]")
    try:
        latest = attempt(folder, 1, job)["attempt"]
        for _ in range(6):
            absent = [a for a in addresses if a not in nodes.running]
            used = [a for a in folder.last_event("attempt")["addresses"] if a in nodes.running]  # type: ignore[index]
            # The head alone has no room for a worker: the run would wait for the next node.
            loses = [a for a in used if a != HEAD and len(nodes.running) > 2]
            act = moment.choice([*(["start"] * bool(absent)), *(["drain", "kill"] * bool(loses))])
            print("CHAOS", act)
            if act == "start":
                nodes.start(moment.choice(absent))
                if len(set(used)) == 4:
                    continue
            elif act == "drain":
                nodes.announce_end(moment.choice(loses))
            else:
                nodes.kill(moment.choice(loses))
            latest = attempt(folder, latest + 1, job)["attempt"]
        job.send_signal(signal.SIGTERM)
        finish(job, code=3)
    finally:
        end(job)
    assert set(outcomes(folder)) <= {"resized", "preempted", "failed", "stopped"}
    assert_each_step_once(folder)
