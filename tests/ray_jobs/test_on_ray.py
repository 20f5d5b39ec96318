"""Tasks of prepare on Ray: every result once, errors as they were raised, dead workers replaced."""

from __future__ import annotations

import functools
import os
import signal
from pathlib import Path

import pytest

from modular_lm.errors import DataError, RunFailedError
from ray_jobs.prepare import on_ray

pytestmark = [pytest.mark.e2e, pytest.mark.usefixtures("ray_session_joined")]


def squared(n: int) -> int:
    return n * n


def dying_once(folder: Path, n: int) -> int:
    marker = folder / str(n)
    if not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return n


def broken(n: int) -> int:
    raise DataError(f"file {n}: is broken")


def dying(n: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_every_result_comes_once() -> None:
    assert sorted(on_ray(squared, range(100))) == [n * n for n in range(100)]
    assert list(on_ray(squared, [])) == []


def test_a_task_whose_worker_dies_is_run_again(tmp_path: Path) -> None:
    assert sorted(on_ray(functools.partial(dying_once, tmp_path), range(3))) == [0, 1, 2]


def test_errors_for_the_user_arrive_as_they_were_raised() -> None:
    with pytest.raises(DataError, match=r"^file \d+: is broken$"):
        list(on_ray(broken, range(3)))


def test_a_file_that_is_missing_on_a_node_is_named(tmp_path: Path) -> None:
    with pytest.raises(RunFailedError, match=r"^on \S+: .*/missing: No such file"):
        list(on_ray(Path.read_bytes, [tmp_path / "missing"]))


def test_a_task_that_dies_each_time_is_no_traceback() -> None:
    with pytest.raises(RunFailedError, match=r"a task of prepare was lost: .*same command again"):
        list(on_ray(dying, [0]))
