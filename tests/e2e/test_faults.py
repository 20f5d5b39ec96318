"""Faults that leave something half-done, or nothing at all: the run goes on, or says why not.

The runs begin as copies of the uninterrupted one that lack its later checkpoints.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from modular_lm.files import lock
from modular_lm.tracking.run_folder import RunFolder
from modular_lm.train.inventory import complete_steps, step_folder
from tests.e2e.test_chaos import CHAOS, random_of
from tests.support import (
    TINY,
    Jobs,
    assert_each_step_once,
    assert_unharmed,
    copied_up_to,
    finish,
    outcomes,
    train_workers,
    wait_until,
)

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(900)]
ROOM = 64 << 20
START = 8 << 20  # room for a run to start in: a copy of the code


def attempts(folder: RunFolder) -> int:
    return [event["event"] for event in folder.events()].count("attempt")


# ------------------------------------------------------------------ the checkpoint write


def half_written(folder: RunFolder) -> list[str]:
    """The checkpoints that are being written, by the names of their unfinished folders."""
    there = folder.checkpoints
    steps = [name for name in os.listdir(there) if name.isdigit()]
    return [name for name in steps if not (there / name / "COMPLETE").exists()]


def freeze_in_a_write(
    folder: RunFolder, job: subprocess.Popen, environment: dict[str, str], moment: random.Random
) -> list[psutil.Process]:
    """Stop all workers while a checkpoint is half-written; they are proved to be in it."""
    wait_until(lambda: attempts(folder) == 2 or job.poll() is not None, "the attempt")
    workers = train_workers(environment)
    assert len(workers) == 2
    while job.poll() is None:
        if not half_written(folder):
            continue
        for _ in range(moment.randrange(2000)):  # a random moment of the write
            pass
        for worker in workers:
            worker.suspend()
        if half_written(folder):
            return workers
        for worker in workers:
            worker.resume()
    pytest.fail("no checkpoint was met while it was written")


@pytest.mark.parametrize("number", [0, *CHAOS])
def test_killed_while_a_checkpoint_is_written(
    uninterrupted: RunFolder, jobs: Jobs, tmp_path: Path, number: int
) -> None:
    moment = random_of("write", number)
    folder = copied_up_to(20, uninterrupted, tmp_path / "run")
    job = jobs.start("ray_jobs.train", *TINY, f"dump_dir={folder.path}", "checkpoint.dump.every=1")
    workers = freeze_in_a_write(folder, job, jobs.environment, moment)
    for worker in workers:
        worker.kill()
    finish(job)
    assert_unharmed(folder, uninterrupted)
    assert outcomes(folder)[1:] == ["failed", "done"]
    assert complete_steps(folder.checkpoints) == [10, *range(20, 41)]
    assert half_written(folder) == [], "swept by the next save"


# ------------------------------------------------------------------ the disk


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own that a test can fill."""
    if os.geteuid() != 0:
        pytest.skip("only root can mount a small file system")
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={ROOM}", "tmpfs", str(disk)]
    mounted = subprocess.run(mount, capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"no small file system can be mounted: {mounted.stderr.strip()}")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


def fill(filler: Path) -> None:
    """Fill a disk to its last block: how much is free is an estimate on a machine of many cores."""
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(bytes(4096)):
            pass


def assert_full_disk_named(output: str, below: Path) -> None:
    (message,) = [line for line in output.splitlines() if line.startswith("error:")]
    assert "No space left on device" in message
    assert str(below) in message
    assert "Traceback" not in output


def test_a_full_disk_is_named_and_the_run_goes_on_when_there_is_space(
    uninterrupted: RunFolder, jobs: Jobs, small_disk: Path
) -> None:
    folder = copied_up_to(10, uninterrupted, small_disk / "run")
    saved = step_folder(folder.checkpoints, 10)
    size = sum(file.stat().st_size for file in saved.iterdir())
    where, filler = f"dump_dir={folder.path}", small_disk / "filler"
    fill(filler)
    output = jobs.run("ray_jobs.train", *TINY, where, code=1)
    assert_full_disk_named(output, folder.path)
    assert not list(folder.path.glob(".*"))
    os.truncate(filler, filler.stat().st_size - START)
    # No metrics meanwhile: they could meet the full disk before the checkpoint does.
    job = jobs.start("ray_jobs.train", *TINY, where, "logging.freq=1000")
    wait_until(lambda: attempts(folder) == 2 or job.poll() is not None, "the attempt")
    with filler.open("ab") as file:
        # Room for logs and metrics, not for a checkpoint.
        file.write(bytes(START - size // 2))
    output = finish(job, code=1)
    assert_full_disk_named(output, folder.checkpoints)
    assert not step_folder(folder.checkpoints, 20).exists()
    assert complete_steps(folder.checkpoints) == [10]
    assert outcomes(folder)[1:] == ["failed"]
    filler.unlink()
    jobs.run("ray_jobs.train", *TINY, where)
    assert_unharmed(folder, uninterrupted)


def test_a_damaged_newest_checkpoint_is_named_and_without_it_the_run_goes_on(
    uninterrupted: RunFolder, jobs: Jobs, tmp_path: Path
) -> None:
    folder = copied_up_to(30, uninterrupted, tmp_path / "run")
    newest = step_folder(folder.checkpoints, 30)
    victim = max(newest.glob("*.distcp"), key=lambda file: file.stat().st_size)
    with victim.open("r+b") as file:
        file.seek(victim.stat().st_size // 2)
        file.write(b"\xff" * 64)
    output = jobs.run("ray_jobs.train", *TINY, f"dump_dir={folder.path}", code=2)
    (message,) = [line for line in output.splitlines() if line.startswith("error:")]
    assert str(newest) in message
    assert victim.name in message
    assert "Traceback" not in output
    assert outcomes(folder)[1:] == ["failed"], "another attempt would meet it again"
    shutil.rmtree(newest)
    jobs.run("ray_jobs.train", *TINY, f"dump_dir={folder.path}")
    assert_unharmed(folder, uninterrupted)
    assert folder.last_event("attempt")["start_step"] == 20  # type: ignore[index]


# ------------------------------------------------------------------ standing still


def test_a_worker_that_is_frozen_fails_the_attempt_and_the_run_goes_on(
    jobs: Jobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    """The others wait for it in a collective, and would for ever."""
    monkeypatch.setenv("MODULAR_LM_CACHE", str(cache))
    folder = RunFolder(tmp_path / "run")
    where = (f"dump_dir={folder.path}", "steps=99999", "hang_timeout_s=10")
    job = jobs.start("ray_jobs.train", *TINY, *where)
    wait_until(lambda: len(list(folder.metrics)) > 2, "some steps")
    train_workers(jobs.environment)[-1].suspend()
    wait_until(lambda: attempts(folder) == 2, "another attempt", 120)
    again = folder.metrics.path.stat().st_size
    wait_until(lambda: folder.metrics.path.stat().st_size != again, "its steps")
    job.send_signal(signal.SIGTERM)
    output = finish(job, code=3)
    assert outcomes(folder) == ["hung", "stopped"]
    assert re.search(r"no progress for \d+ s .*rank [01] silent", output)
    assert re.search(r"rank [01] in \w+ \(\w+\.py:\d+\), from", output)
    assert any("All threads of rank" in file.read_text() for file in folder.logs.iterdir())
    assert_each_step_once(folder)


def test_ranks_of_torchrun_that_stand_still_say_where_and_end(
    plain_jobs: Jobs, tmp_path: Path
) -> None:
    """Rank 0 waits for a lock, the other for rank 0."""
    folder = RunFolder(tmp_path / "run")
    folder.create()
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    with lock(folder.ray / "writer.lock"):
        output = plain_jobs.run(
            *("modular_lm.train", *TINY, f"dump_dir={folder.path}", "hang_timeout_s=1"),
            code=1,
            launcher=torchrun,
        )
    (message,) = [line for line in output.splitlines() if line.startswith("error:")]
    assert re.search(r"no progress for \d+ s \(start, before the first step\)", message)
    assert re.search(r"rank 0 in _acquire \(files\.py:\d+\)", message)
    assert re.search(r"rank 1 in \w+ \(.*\), from \w+ \(\w+\.py:\d+\)", message)
    assert outcomes(folder) == ["hung"]
    assert folder.last_event("end")["status"] == "failed"  # type: ignore[index]
