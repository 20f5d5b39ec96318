"""What of Ray's processes' output is for the terminal."""

from __future__ import annotations

import pytest

from ray_jobs._quiet import quieten, wanted_lines


def test_training_workers_and_the_cluster_are_heard_and_rays_own_actors_are_not() -> None:
    lines = ["Traceback (most recent call last):", "GetTimeoutError"]
    assert wanted_lines({"actor_name": "RayTrainWorker", "lines": lines}) == lines
    assert wanted_lines({"pid": "autoscaler", "lines": lines}) == lines
    assert wanted_lines({"actor_name": "TrainController", "lines": lines}) == []
    raylet = ["WARNING: 8 PYTHON worker processes have been started on node: 1", "no memory"]
    assert wanted_lines({"pid": "raylet", "lines": raylet}) == ["no memory"]


def test_rays_driver_prints_by_this_choice(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = pytest.importorskip("ray._private.worker")
    monkeypatch.setattr(worker, "print_to_stdstream", worker.print_to_stdstream)
    quieten()
    quieten()
    for actor, line in (("TrainController", "left out"), ("RayTrainWorker", "heard")):
        batch = {"actor_name": actor, "lines": [line], "pid": 1, "is_err": False, "ip": "-"}
        worker.print_to_stdstream({**batch, "localhost": "-", "job": "1"}, ignore_prefix=False)
    printed = capsys.readouterr().out
    assert "left out" not in printed
    assert printed.count("heard") == 1
