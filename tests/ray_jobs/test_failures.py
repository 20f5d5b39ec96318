"""What a failed Ray job says: the first cause on one line, whatever Ray wrapped it in."""

from __future__ import annotations

import traceback

from ray.exceptions import RayTaskError
from ray.train import ControllerError, WorkerGroupError
from ray.train.v2._internal.exceptions import UserExceptionWithTraceback

from modular_lm.errors import DataError, FullDiskError, RunFailedError
from ray_jobs._failures import cause_of, explain


def wrapped(error: Exception) -> Exception:
    try:
        raise error
    except Exception as caught:
        return UserExceptionWithTraceback(caught, traceback.format_exc())


def in_task(error: Exception) -> RayTaskError:
    try:
        raise error
    except Exception as caught:
        return RayTaskError("task", traceback.format_exc(), caught)


def test_an_error_of_a_worker() -> None:
    error = WorkerGroupError("many lines", {1: wrapped(RunFailedError("disk is full"))})
    assert explain(error) == ("disk is full", 1)


def test_bad_input_found_in_a_task_keeps_its_exit_code() -> None:
    lost_peer = wrapped(RuntimeError("connection closed by peer"))
    shard = wrapped(in_task(DataError("train-00000.parquet: cut short")))
    error = WorkerGroupError("many lines", {0: lost_peer, 1: shard})
    assert explain(error) == ("train-00000.parquet: cut short", 2)


def test_a_full_disk_is_recognised_in_what_ray_wraps() -> None:
    lost_peer = wrapped(RuntimeError("connection closed by peer"))
    error = WorkerGroupError("many lines", {0: wrapped(FullDiskError("full")), 1: lost_peer})
    assert isinstance(cause_of(error), FullDiskError)
    assert explain(error) == ("full", 1)


def test_anything_else_is_one_line_without_a_traceback() -> None:
    message, code = explain(WorkerGroupError("many lines", {0: wrapped(ValueError("odd\nthing"))}))
    assert (message, code) == ("training failed: odd thing", 1)
    message, code = explain(ControllerError(RuntimeError("no resources")))
    assert (message, code) == ("training failed: no resources", 1)
