"""How many trials are let in: beside what others hold, and what those that run have yet to take."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from modular_lm.config.schema import RayConfig
from modular_lm.tracking.run_folder import RunFolder
from ray_jobs import _room
from ray_jobs._room import Room


class Cluster:
    """So many free CPUs on one node, and what was asked for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, free: int) -> None:
        self.free, self.asked = free, list[Any]()
        monkeypatch.setattr(_room, "room_for", lambda c, gpu, free: self.free // c.cpus_per_worker)
        monkeypatch.setattr(_room, "use_gpu", lambda c: False)
        monkeypatch.setattr(_room, "ask_for", lambda *what: self.asked.append(what))
        monkeypatch.setattr(_room, "_LOOK_EVERY_S", 0.0)


def jobs_of(path: Path, **configs: RayConfig) -> dict[str, Any]:
    found = {}
    for name, config in configs.items():
        folder = RunFolder(path / name)
        folder.create()
        run = SimpleNamespace(folder=folder, config=SimpleNamespace(ray=config))
        found[name] = SimpleNamespace(run=run)
    return found


def attempt(job: Any, number: int, world_size: int) -> None:
    job.run.folder.append_event("attempt", attempt=number, world_size=world_size)


def test_what_a_trial_has_not_taken_yet_is_kept_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster, two = Cluster(monkeypatch, 5), RayConfig(num_workers=2)
    jobs = jobs_of(tmp_path, a=two, b=two, c=two)
    room = Room(jobs, 8)
    assert room.admits("a")
    assert room.admits("b")
    assert not room.admits("c"), "5 CPUs are free, and the two that begin take 4 of them"
    attempt(jobs["a"], 1, 2)
    cluster.free = 3
    assert not room.admits("c"), "one of the 3 is left beside the second"
    attempt(jobs["b"], 1, 2)
    cluster.free = 1
    assert not room.admits("c")
    cluster.free = 3
    assert room.admits("c"), "another job has ended, or a node has come"
    attempt(jobs["c"], 1, 2)
    jobs["a"].run.folder.append_event("attempt_end", attempt=1)
    room.leave("c")
    cluster.free = 3
    assert not room.admits("c"), "between two attempts its workers are kept for the first"


def test_an_attempt_of_a_driver_that_was_killed_holds_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Cluster(monkeypatch, 3)
    two = RayConfig(num_workers=2)
    jobs = jobs_of(tmp_path, a=two, b=two)
    attempt(jobs["a"], 1, 2)
    room = Room(jobs, 8)
    assert room.admits("a")
    assert not room.admits("b")
    attempt(jobs["a"], 2, 2)
    assert room.admits("b")


def test_trials_of_different_sizes_count_by_their_cpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Cluster(monkeypatch, 7)
    large, small = RayConfig(num_workers=[1, 2], cpus_per_worker=3), RayConfig(num_workers=1)
    jobs = jobs_of(tmp_path, a=small, b=large, c=small)
    room = Room(jobs, 8)
    assert room.admits("a")
    assert not room.admits("b"), "7 hold two workers of 3, and one CPU of them is the first's"
    room.leave("a")
    assert room.admits("b")
    assert room.admits("c")


def test_one_always_may_and_never_more_than_allowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster, one = Cluster(monkeypatch, 0), RayConfig(num_workers=1)
    jobs = jobs_of(tmp_path, a=one, b=one, c=one)
    room = Room(jobs, 2, wanted=2)
    assert room.admits("a"), "it waits by itself, and asks the cluster to grow"
    assert not room.admits("b")
    assert cluster.asked == [(one, 2)]
    cluster.free = 9
    assert room.admits("b")
    assert not room.admits("c")
    room.close()
    assert cluster.asked == [(one, 2), ()]


def test_a_trial_whose_gpus_are_missing_fails_by_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Cluster(monkeypatch, 0)

    def use_gpu(config: RayConfig) -> bool:
        raise _room.ConfigError("ray.num_workers=1: each needs a GPU")

    jobs = jobs_of(tmp_path, a=RayConfig(), b=RayConfig())
    room = Room(jobs, 2)
    assert room.admits("a")
    monkeypatch.setattr(_room, "use_gpu", use_gpu)
    assert room.admits("b")
