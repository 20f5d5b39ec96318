"""What end-to-end tests share: jobs as subprocesses, waiting, and what they leave on disk."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest

from modular_lm.tracking.run_folder import RunFolder
from modular_lm.train.inventory import complete_steps

TIMEOUT = 480.0
CHECKPOINT_EVERY = 10

# A model of 30 k parameters whose samples have four chunks; every step is logged.
TINY = [
    "config=configs/debug.yaml",
    "steps=40",
    "data.seq_len=64",
    "data.batch_size=4",
    "model.dim=32",
    "model.n_layers=2",
    "model.n_heads=2",
    "model.module_seq_len=16",
    "model.module_agg=stack",
    "optim.warmup=5",
    f"checkpoint.dump.every={CHECKPOINT_EVERY}",
    "checkpoint.dump.keep=-1",
    "checkpoint.eval.every=0",
    "eval.validation.max_docs=4",
    "logging.freq=1",
    "logging.mlflow.enabled=false",
]
REPO = Path(__file__).resolve().parents[1]


def wait_until(condition: Callable[[], Any], what: str, timeout: float = TIMEOUT) -> Any:
    """The first true value of `condition`, looked at often; fails after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.05)
    pytest.fail(f"waited {timeout:.0f} s for {what}")


@dataclass
class Jobs:
    """Starts jobs as a user would, with the environment of this session's Ray."""

    environment: dict[str, str]
    started: list[subprocess.Popen[str]] = field(default_factory=list)

    def start(self, module: str, *args: str, launcher: tuple[str, ...] = ()) -> subprocess.Popen:
        process = subprocess.Popen(
            [sys.executable, *launcher, "-m", module, *args],
            cwd=REPO,
            env=self.environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        self.started.append(process)
        return process

    def run(self, module: str, *args: str, code: int = 0, launcher: tuple[str, ...] = ()) -> str:
        """Run to the end; returns what it printed, fails on another exit code."""
        process = self.start(module, *args, launcher=launcher)
        return finish(process, code)


def finish(process: subprocess.Popen[str], code: int = 0) -> str:
    """Wait for a job; returns what it printed, fails on another exit code."""
    output, _ = process.communicate(timeout=TIMEOUT)
    assert process.returncode == code, output[-6000:]
    return output


def losses(folder: RunFolder) -> dict[int, float]:
    """The logged loss of every step; a step that stands twice is an error."""
    lines = [(line["global_step"], line["loss/out"]) for line in folder.metrics]
    assert len({step for step, _ in lines}) == len(lines)
    return dict(lines)


def assert_unharmed(folder: RunFolder, uninterrupted: RunFolder) -> None:
    """That a run did, in the end, what the uninterrupted one did: same samples, same losses.

    A digest stands for all samples and tokens up to its step, so equal digests at every step mean
    equal (step, sample indices, tokens). What was done twice is in the event log.
    """
    assert losses(folder) == losses(uninterrupted)
    assert digests(folder) == digests(uninterrupted)
    attempts = [event for event in folder.events() if event["event"] == "attempt"]
    # A rolling one that a later one has replaced is still in the event log.
    saved = {event["step"] for event in folder.events() if event["event"] == "checkpoint"}
    assert saved >= {*complete_steps(folder.checkpoints)}
    assert attempts[0]["start_step"] == attempts[0]["steps_again"] == 0
    for attempt in attempts:
        assert 0 <= attempt["steps_again"] <= CHECKPOINT_EVERY
        assert attempt["start_step"] in {0, *saved}


def digests(folder: RunFolder) -> dict[int, str]:
    """The digest of all samples seen up to every logged step."""
    return {line["global_step"]: line["data/digest"] for line in folder.metrics}


def train_workers(environment: dict[str, str]) -> list[psutil.Process]:
    """The Ray Train worker processes of the session's Ray."""
    return _ray_processes(environment, "RayTrainWorker")


def reading_tasks(environment: dict[str, str]) -> list[psutil.Process]:
    """The processes of the session's Ray in which Ray Data reads right now."""
    return _ray_processes(environment, "ReadSegment")


def _ray_processes(environment: dict[str, str], what: str) -> list[psutil.Process]:
    token = environment["RAY_AUTH_TOKEN_PATH"]
    found = []
    for process in psutil.process_iter(["cmdline"]):
        name = (process.info["cmdline"] or [""])[0]
        if name.startswith("ray::") and what in name:
            try:
                if process.environ().get("RAY_AUTH_TOKEN_PATH") == token:
                    found.append(process)
            except psutil.Error:
                continue
    return found


def end(process: subprocess.Popen) -> None:
    """End a process and its children, by their ids, politely first."""
    if process.poll() is not None:
        return
    family = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        process.kill()
    for child in psutil.wait_procs(family, timeout=10)[1]:
        child.kill()


def free_ports(n: int) -> list[int]:
    """Ports on loopback that nobody listens on at the moment."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(n)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


def listens(port: int) -> bool:
    """Whether somebody accepts connections on loopback."""
    with socket.socket() as s:
        s.settimeout(1)
        return s.connect_ex(("127.0.0.1", port)) == 0
