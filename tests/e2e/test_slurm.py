"""Training inside jobs of a real SLURM: both nodes, signals, requeues, lost nodes, nothing left."""

from __future__ import annotations

import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from cluster import _ray_start
from cluster.slurm import launch_job, launch_jobs
from modular_lm.tracking.run_folder import RunFolder
from modular_lm.train.inventory import complete_steps
from tests.slurm import Slurm
from tests.support import REPO, TINY, assert_unharmed, losses, train_workers, wait_until
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

    def submit(self, name: str, *overrides: str, **options: Any) -> str:
        """Train in `root/name`; returns the job's id."""
        where = f"dump_dir={self.folder(name).path}"
        job = launch_job(CONFIG, [*ARGUMENTS, where, *overrides], **{**self.options, **options})
        assert job is not None
        self.submitted.append(job)
        return job

    def submit_array(self, *names: str) -> list[str]:
        """Train in these folders, one after the other; returns the ids of the tasks."""
        base = yaml.safe_load(CONFIG.read_text())
        configs = [{**base, "dump_dir": str(self.folder(name).path)} for name in names]
        jobs = launch_jobs(configs, ARGUMENTS, array_limit=1, **self.options)
        found = [job for job in jobs if job is not None]
        self.submitted += found
        return found

    def folder(self, name: str) -> RunFolder:
        return RunFolder(self.root / name)

    def finish(self, job: str, name: str, state: str = "COMPLETED") -> None:
        """Wait until a job has ended, and fail with its output unless so."""
        ended = self.slurm.wait(job, *ENDED)
        logs = self.folder(name).logs
        files = [*logs.glob("slurm-*.out"), *logs.glob("ray/*.log")]
        assert ended == state, "\n".join(f"--- {f}\n{f.read_text()[-6000:]}" for f in files)

    def output(self, name: str, job: str) -> str:
        """What a job has printed so far, in all of its starts."""
        file = self.folder(name).logs / f"slurm-{job}.out"
        return file.read_text() if file.exists() else ""

    def workers(self, name: str) -> dict[str, psutil.Process]:
        """The training processes of a run, by the node that SLURM knows them on."""
        (token,) = self.folder(name).ray.glob("slurm/*/token")
        found = train_workers({"RAY_AUTH_TOKEN_PATH": str(token)})
        return {process.environ()["SLURMD_NODENAME"]: process for process in found}

    def reach(self, name: str, step: int) -> None:
        """Wait until a run has logged this step."""
        folder = self.folder(name)
        wait_until(lambda: any(m["global_step"] >= step for m in folder.metrics), f"step {step}")

    def lose_until_requeued(self, job: str, node: str) -> None:
        """The machine of a node fails, and is there again when the job waits for it."""
        self.slurm.fail(node)
        try:
            wait_until(lambda: self.slurm.restarts(job) == 1, "the requeue", 120)
        finally:
            self.slurm.repair(node)

    def raylet(self, job: str, node: str) -> psutil.Process:
        """The raylet of one node of a job's first start."""
        (folder,) = self.temp_root.glob(f"mlm{job}-{node}-*")
        (found,) = [p for p in _ray_start.marked(str(folder)) if p.name() == "raylet"]
        return found


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


def test_a_node_that_is_lost_ends_the_attempt_and_the_job_is_requeued(training: Jobs) -> None:
    """All nodes are needed: what is left of the job goes back into the queue by itself."""
    job = training.submit("lost")
    training.reach("lost", 12)
    training.raylet(job, "n1").send_signal(signal.SIGKILL)
    training.finish(job, "lost")
    folder = training.folder("lost")
    assert complete_steps(folder.checkpoints)[-1] == 40
    assert list(losses(folder)) == list(range(1, 41))
    assert len(attempts(folder)) >= 2
    assert "node n1 is lost" in training.output("lost", job)
    assert training.slurm.restarts(job) == 1


@pytest.mark.chaos
def test_a_job_goes_on_after_its_time_limit(training: Jobs) -> None:
    """A real one, ahead of which SLURM itself sends the signal: one to two minutes before."""
    slurm = training.slurm
    job = training.submit("long", "steps=1000000", time="4", signal_s=60)
    wait_until(lambda: slurm.restarts(job) == 1, "the requeue", 300)
    folder = training.folder("long")
    assert stop_reasons(folder) == [f"SLURM job {job} is near its time limit (SIGUSR1)"]
    saved = complete_steps(folder.checkpoints)[-1]
    assert saved > 0
    wait_until(lambda: len(attempts(folder)) == 2, "the next attempt", 240)
    assert attempts(folder)[1]["start_step"] == saved
    slurm.run("scancel", job)
    training.finish(job, "long", "CANCELLED")


@pytest.mark.chaos
def test_an_elastic_run_goes_on_with_the_node_that_is_left(training: Jobs) -> None:
    job = training.submit("shrunk", "ray.num_workers=[1,2]")
    training.reach("shrunk", 12)
    training.raylet(job, "n1").send_signal(signal.SIGKILL)
    training.finish(job, "shrunk")
    folder = training.folder("shrunk")
    assert complete_steps(folder.checkpoints)[-1] == 40
    sizes = [attempt["world_size"] for attempt in attempts(folder)]
    assert (sizes[0], sizes[-1]) == (2, 1)
    assert "node n1 is lost" in training.output("shrunk", job)
    assert training.slurm.restarts(job) == 0


@pytest.mark.chaos
def test_a_job_that_is_stopped_before_it_begins_is_not_requeued_for_ever(training: Jobs) -> None:
    slurm = training.slurm
    job = training.submit("never")
    logs = training.folder("never").logs / "ray"
    for start in (0, 1):
        wait_until((logs / f"{job}-{start}.log").exists, f"start {start}", 120)
        slurm.run("scancel", "--signal=USR1", "--batch", job)
    training.finish(job, "never", "FAILED")
    assert slurm.restarts(job) == 1
    assert "has saved no checkpoint since: it ends here" in training.output("never", job)
    assert slurm.exit_code(job) == 1


@pytest.mark.chaos
@pytest.mark.parametrize("node", NODES)
def test_a_machine_fails_and_slurm_requeues(training: Jobs, node: str) -> None:
    """A job that needs all of its nodes."""
    job = training.submit("down")
    training.reach("down", 12)
    training.lose_until_requeued(job, node)
    training.finish(job, "down")
    folder = training.folder("down")
    assert complete_steps(folder.checkpoints)[-1] == 40
    assert attempts(folder)[-1]["start_step"] >= 10


@pytest.mark.chaos
def test_the_first_machine_fails_and_the_other_requeues(training: Jobs) -> None:
    """A job that can do with one node is not ended by SLURM, but has lost what drives it."""
    job = training.submit("first", "ray.num_workers=[1,2]")
    training.reach("first", 12)
    training.lose_until_requeued(job, "n0")
    training.finish(job, "first")
    assert "has lost its first node, n0: requeued by n1" in training.output("first", job)
    folder = training.folder("first")
    assert complete_steps(folder.checkpoints)[-1] == 40
    assert attempts(folder)[-1]["start_step"] >= 10


@pytest.mark.chaos
def test_a_cancelled_job_leaves_nothing_and_its_run_can_go_on(training: Jobs) -> None:
    job = training.submit("cancelled")
    training.reach("cancelled", 12)
    training.slurm.run("scancel", job)
    training.finish(job, "cancelled", "CANCELLED")
    folder = training.folder("cancelled")
    assert 10 <= complete_steps(folder.checkpoints)[-1] < 40
    again = training.submit("cancelled")
    training.finish(again, "cancelled")
    assert list(losses(folder)) == list(range(1, 41))


@pytest.mark.chaos
def test_a_preempted_job_saves_and_goes_on_when_the_nodes_are_free(training: Jobs) -> None:
    slurm = training.slurm
    job = training.submit("preempted")
    training.reach("preempted", 3)
    urgent = slurm.run(
        *("sbatch", "--parsable", "--partition=urgent", "--nodes=2", "--exclusive"),
        *("--output=/dev/null", "--wrap=srun sleep 5"),
    ).strip()
    training.submitted.append(urgent)
    training.finish(job, "preempted")
    assert slurm.state(urgent) == "COMPLETED"
    folder = training.folder("preempted")
    assert stop_reasons(folder) == [f"SLURM job {job} is preempted (SIGTERM)"]
    first, second = attempts(folder)
    assert 3 <= second["start_step"] < 40
    assert first["start_step"] == second["steps_again"] == 0


@pytest.mark.chaos
def test_a_task_of_an_array_requeues_itself_only(training: Jobs) -> None:
    """Its other task is still waiting and must not start a second time."""
    slurm = training.slurm
    first, second = training.submit_array("first", "second")
    training.reach("first", 3)
    slurm.run("scancel", "--signal=USR1", "--batch", first)
    wait_until(lambda: slurm.restarts(first) == 1, "the requeue of the task", 120)
    assert slurm.restarts(second) == 0
    for job, name in ((first, "first"), (second, "second")):
        training.finish(job, name)
    assert slurm.restarts(second) == 0
    assert stop_reasons(training.folder("first")) == [
        f"SLURM job {first} is near its time limit (SIGUSR1)"
    ]
    assert len(attempts(training.folder("second"))) == 1
