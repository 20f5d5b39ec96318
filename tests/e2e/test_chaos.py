"""Drivers, workers and reading tasks killed at random moments; the run must not notice.

One of each in `make test` (a worker's is in `test_train_job`). `make chaos` kills CHAOS_ROUNDS
(default 10) of each kind; CHAOS_SEED makes a failure repeatable.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
from pathlib import Path

import pytest

from modular_lm.tracking.run_folder import RunFolder
from tests.support import (
    TINY,
    Jobs,
    assert_unharmed,
    finish,
    reading_tasks,
    train_workers,
    wait_until,
)

# A failure prints it; the rounds that belong to `make test` do not change.
SEED = int(os.environ.get("CHAOS_SEED") or random.SystemRandom().randrange(10**6))
CHAOS = [
    pytest.param(number, marks=pytest.mark.chaos)
    for number in range(1, 1 + int(os.environ.get("CHAOS_ROUNDS", "10")))
]
pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(900)]


def random_of(what: str, number: int) -> random.Random:
    """What decides a round; round 0 is the same each time."""
    seed = SEED if number else 0
    print(f"CHAOS_SEED={seed} {what} {number}")
    return random.Random(f"{seed} {what} {number}")


def reach(folder: RunFolder, step: int, job: subprocess.Popen) -> None:
    """Wait until the run has logged `step`."""
    wait_until(
        lambda: job.poll() is not None or any(m["global_step"] >= step for m in folder.metrics),
        f"step {step}",
    )


@pytest.mark.parametrize("number", CHAOS)
def test_a_worker_killed_at_a_random_step(
    uninterrupted: RunFolder, jobs: Jobs, tmp_path: Path, number: int
) -> None:
    moment = random_of("worker", number)
    folder = RunFolder(tmp_path / "run")
    job = jobs.start("ray_jobs.train", *TINY, f"dump_dir={folder.path}")
    reach(folder, moment.randint(1, 38), job)
    moment.choice(train_workers(jobs.environment)).send_signal(signal.SIGKILL)
    finish(job)
    assert_unharmed(folder, uninterrupted)


@pytest.mark.parametrize("number", [0, *CHAOS])
def test_the_driver_killed_at_a_random_step(
    uninterrupted: RunFolder, jobs: Jobs, tmp_path: Path, number: int
) -> None:
    moment = random_of("driver", number)
    folder = RunFolder(tmp_path / "run")
    job = jobs.start("ray_jobs.train", *TINY, f"dump_dir={folder.path}")
    reach(folder, moment.randint(1, 36), job)
    job.send_signal(signal.SIGKILL)
    job.wait()
    jobs.run("ray_jobs.train", *TINY, f"dump_dir={folder.path}")
    assert_unharmed(folder, uninterrupted)


@pytest.mark.parametrize("number", [0, *CHAOS])
def test_a_reading_task_killed_at_a_random_step(
    uninterrupted: RunFolder, jobs: Jobs, tmp_path: Path, number: int
) -> None:
    """Ray Data runs it again, and the workers do not stop for it."""
    moment = random_of("reader", number)
    folder = RunFolder(tmp_path / "run")
    job = jobs.start("ray_jobs.train", *TINY, f"dump_dir={folder.path}")
    reach(folder, moment.randint(1, 20), job)
    # Of 40 deliveries some are yet to be read at step 20, but not always at this moment.
    victims = wait_until(lambda: reading_tasks(jobs.environment), "a reading task")
    moment.choice(victims).send_signal(signal.SIGKILL)
    finish(job)
    assert_unharmed(folder, uninterrupted)
    assert [event["event"] for event in folder.events()].count("attempt") == 1
