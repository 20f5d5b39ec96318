"""Training inside jobs of a real SLURM: both nodes, a signal, a requeue, nothing left."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from cluster.slurm import launch_job
from modular_lm.tracking.run_folder import RunFolder
from tests.slurm import Slurm
from tests.support import REPO, TINY, assert_unharmed, train_workers, wait_until
from tests.tracking.mlflow_store import runs

CONFIG = REPO / "configs" / "debug.yaml"
# One worker to a node, with one CPU to spare for Ray Data.
ARGUMENTS = [*TINY[1:], "ray.cpus_per_worker=2"]
OPTIONS = {"nodes": 2, "cpus_per_node": 3, "time": "20", "signal_s": 120}
NODES = ("n0", "n1")
MLFLOW = "logging.mlflow.enabled=true"
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
pytestmark = [
    pytest.mark.slurm,
    pytest.mark.e2e,
    pytest.mark.slow,
    pytest.mark.timeout(900),
]


class Jobs:
    """Submits training as the launcher does, and knows what it leaves."""

    def __init__(self, slurm: Slurm, root: Path, temp_root: Path) -> None:
        self.slurm, self.root, self.temp_root = slurm, root, temp_root
        self.submitted: list[str] = []
        site = root / "site.yaml"
        site.write_text(f"description: a folder for Ray\ntemp_root: {temp_root}\n")
        self.options: dict[str, Any] = {**OPTIONS, "site": str(site)}

    def submit(self, name: str, *overrides: str) -> str:
        """Train in `root/name`; returns the job's id."""
        where = f"dump_dir={self.folder(name).path}"
        job = launch_job(CONFIG, [*ARGUMENTS, where, *overrides], **self.options)
        assert job is not None
        self.submitted.append(job)
        return job

    def folder(self, name: str) -> RunFolder:
        return RunFolder(self.root / name)

    def finish(self, job: str, name: str) -> None:
        """Wait until a job has ended; fail with its output unless it completed."""
        ended = self.slurm.wait(job, *ENDED)
        assert ended == "COMPLETED", self.output(name)

    def output(self, name: str) -> str:
        """The ends of what a job and its nodes printed."""
        files = [*self.folder(name).logs.glob("slurm-*.out")]
        files += self.folder(name).logs.glob("ray/*.log")
        return "\n".join(f"--- {f}\n{f.read_text()[-6000:]}" for f in files)

    def workers(self, name: str) -> dict[str, psutil.Process]:
        """The training processes of a run, by the node that SLURM knows them on."""
        (token,) = self.folder(name).ray.glob("slurm/*/token")
        found = train_workers({"RAY_AUTH_TOKEN_PATH": str(token)})
        return {process.environ()["SLURMD_NODENAME"]: process for process in found}

    def reach(self, name: str, step: int) -> None:
        """Wait until a run has logged this step."""
        folder = self.folder(name)
        wait_until(lambda: any(m["global_step"] >= step for m in folder.metrics), f"step {step}")


@pytest.fixture
def training(
    slurm: Slurm, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Jobs]:
    """Submits jobs; at the end none of them, and nothing of them, is left."""
    monkeypatch.setenv("SLURM_CONF", slurm.environment["SLURM_CONF"])
    monkeypatch.setenv("MODULAR_LM_CACHE", str(cache))
    monkeypatch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    # Jobs of another SLURM on this machine, with the same numbers, have their folders elsewhere.
    with tempfile.TemporaryDirectory(prefix="mlm", dir="/tmp") as short:
        jobs = Jobs(slurm, tmp_path, Path(short))
        try:
            yield jobs
            if all(slurm.state(job) in ENDED for job in jobs.submitted):
                wait_until(lambda: not slurm.processes(), "the last processes of the jobs", 30)
                assert list(jobs.temp_root.iterdir()) == []
                assert list(tmp_path.glob("*/ray/slurm/*/token")) == []
        finally:
            slurm.cancel_all()


def attempts(folder: RunFolder) -> list[dict]:
    return [event for event in folder.events() if event["event"] == "attempt"]


def stop_reasons(folder: RunFolder) -> list[str]:
    return [event["reason"] for event in folder.events() if event["event"] == "stop_requested"]


def test_two_jobs_share_both_hosts_and_one_is_interrupted_and_requeued(training: Jobs) -> None:
    """By the signal ahead of the time limit; it ends where the other, undisturbed one does."""
    slurm = training.slurm
    whole = training.submit("whole")
    cut = training.submit("cut", MLFLOW)
    training.reach("cut", 3)
    assert set(training.workers("cut")) == set(NODES)
    slurm.run("scancel", "--signal=USR1", "--batch", cut)
    training.finish(whole, "whole")
    training.finish(cut, "cut")
    assert_unharmed(training.folder("cut"), training.folder("whole"))
    first, second = attempts(training.folder("cut"))
    assert 3 <= second["start_step"] < 40
    assert second["steps_again"] == first["start_step"] == 0
    assert stop_reasons(training.folder("cut")) == [
        f"SLURM job {cut} is near its time limit (SIGUSR1)"
    ]
    assert len(attempts(training.folder("whole"))) == 1
    (mirrored,) = runs(training.root)
    assert mirrored.info.status == "FINISHED"
    for name, starts in (("whole", 1), ("cut", 2)):
        for node in NODES:
            saved = list(training.folder(name).logs.glob(f"ray/{node}/*"))
            assert len(saved) == starts
            assert all((folder / "raylet.out").stat().st_size > 0 for folder in saved)
