"""What end-to-end tests share: jobs as subprocesses, waiting, and what they leave on disk."""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import yaml

from modular_lm.config import TrainConfig
from modular_lm.config.load import from_dict
from modular_lm.data.dataset import Dataset
from modular_lm.data.fingerprint import digest
from modular_lm.tokenizer import build_tokenizer
from modular_lm.tracking.run_folder import RunFolder
from modular_lm.train.inventory import complete_steps, step_folder

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
            process_group=0,  # as a shell has it, so that signals can be sent to all of a job
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
        # Training goes on while a checkpoint is written, at most until the next one is due.
        assert 0 <= attempt["steps_again"] <= 2 * CHECKPOINT_EVERY
        assert attempt["start_step"] in {0, *saved}


def copied_up_to(step: int, source: RunFolder, path: Path) -> RunFolder:
    """A copy of a finished run whose checkpoints behind `step` are gone: it goes on from there."""
    shutil.copytree(source.path, path, ignore=shutil.ignore_patterns("*.lock"))
    copy = RunFolder(path)
    for newer in complete_steps(copy.checkpoints):
        if newer > step:
            shutil.rmtree(step_folder(copy.checkpoints, newer))
    copy.last_step.write(step)
    return copy


def outcomes(folder: RunFolder) -> list[str]:
    """How every attempt ended; each has ended once."""
    events = list(folder.events())
    begun = [e["attempt"] for e in events if e["event"] == "attempt"]
    ends = [e for e in events if e["event"] == "attempt_end"]
    assert [e["attempt"] for e in ends] == begun
    return [e["outcome"] for e in ends]


def assert_each_step_once(folder: RunFolder) -> None:
    """That the weights have seen what the plan says, step by step, each step once."""
    config = from_dict(TrainConfig, yaml.safe_load(folder.config.read_text()))
    created = folder.last_event("created")
    assert created is not None
    batch = created["global_batch_size"]
    data = Dataset(config.data, build_tokenizer(config.data.tokenizer), batch)
    found, seen = digests(folder), 0
    assert list(found) == list(range(1, len(found) + 1))
    for step in found:
        index = np.arange((step - 1) * batch, step * batch)
        seen = (seen + digest(index, data.read(index))) % 2**64
        assert found[step] == f"{seen:016x}", step


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
