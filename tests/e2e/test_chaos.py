"""`make chaos`: workers and drivers killed at random moments; the run must not notice.

CHAOS_ROUNDS (default 5) kills of each kind; CHAOS_SEED makes a failure repeatable.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
from pathlib import Path

import pytest

from modular_lm.tracking.run_folder import RunFolder
from tests.support import TINY, Jobs, finish, losses, train_workers, wait_until

ROUNDS = int(os.environ.get("CHAOS_ROUNDS", "5"))
SEED = int(os.environ.get("CHAOS_SEED", "0"))
pytestmark = [pytest.mark.chaos, pytest.mark.e2e, pytest.mark.timeout(900)]


def reach(folder: RunFolder, step: int, job: subprocess.Popen) -> None:
    """Wait until the run has logged `step`."""
    wait_until(
        lambda: job.poll() is not None or any(m["global_step"] >= step for m in folder.metrics),
        f"step {step}",
    )


@pytest.mark.parametrize("round_", range(ROUNDS))
def test_a_worker_killed_at_a_random_step(
    uninterrupted: RunFolder, jobs: Jobs, tmp_path: Path, round_: int
) -> None:
    moment = random.Random(f"{SEED} worker {round_}")
    folder = RunFolder(tmp_path / "run")
    job = jobs.start("ray_jobs.train", *TINY, f"dump_dir={folder.path}")
    reach(folder, moment.randint(1, 40), job)
    moment.choice(train_workers(jobs.environment)).send_signal(signal.SIGKILL)
    finish(job)
    assert losses(folder) == losses(uninterrupted)


@pytest.mark.parametrize("round_", range(ROUNDS))
def test_the_driver_killed_at_a_random_step(
    uninterrupted: RunFolder, jobs: Jobs, tmp_path: Path, round_: int
) -> None:
    moment = random.Random(f"{SEED} driver {round_}")
    folder = RunFolder(tmp_path / "run")
    job = jobs.start("ray_jobs.train", *TINY, f"dump_dir={folder.path}")
    reach(folder, moment.randint(1, 36), job)
    job.send_signal(signal.SIGKILL)
    job.wait()
    jobs.run("ray_jobs.train", *TINY, f"dump_dir={folder.path}")
    assert losses(folder) == losses(uninterrupted)
