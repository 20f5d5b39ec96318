"""The pool itself: results of every rank, and what a test sees of tasks that go wrong."""

from __future__ import annotations

import os
import time

import pytest
import torch
import torch.distributed as dist

from tests.pool import Pool, PoolError

pytestmark = pytest.mark.slow


def total(value: int) -> tuple[int, int, int]:
    sum_of_ranks = torch.tensor(value * dist.get_rank())
    dist.all_reduce(sum_of_ranks)
    return dist.get_rank(), dist.get_world_size(), int(sum_of_ranks)


def process() -> int:
    return os.getpid()


def fail_on(rank: int) -> None:
    if dist.get_rank() == rank:
        raise ValueError("told to fail")


def fail_on_1_before_others_meet() -> None:
    fail_on(1)
    dist.barrier()


def die() -> None:
    if dist.get_rank() == 0:
        os._exit(3)
    dist.barrier()


def sleep_on_rank_1() -> None:
    if dist.get_rank() == 1:
        time.sleep(600)


def test_every_rank_answers_and_processes_stay(pool: Pool) -> None:
    before = pool.run(4, process)
    assert len(set(before)) == 4
    for size in (1, 2, 4, 3):
        expected = [(rank, size, 10 * sum(range(size))) for rank in range(size)]
        assert pool.run(size, total, 10) == expected
    assert pool.run(4, process) == before


def test_a_rank_that_raises_is_quoted_and_the_pool_goes_on(pool: Pool) -> None:
    before = pool.run(2, process)
    with pytest.raises(PoolError, match=r"rank 0: ended(?s:.*)rank 1: (?s:.*)told to fail"):
        pool.run(2, fail_on, 1)
    with pytest.raises(PoolError, match=r"rank 0: (?s:.*)barrier(?s:.*)rank 1: (?s:.*)told to"):
        pool.run(2, fail_on_1_before_others_meet)
    assert pool.run(2, process) == before


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (die, r"rank 0: its process died"),
        (sleep_on_rank_1, r"rank 1: has not ended(?s:.*)in sleep_on_rank_1"),
    ],
)
def test_what_does_not_end_is_shown_and_replaced(
    pool: Pool, monkeypatch: pytest.MonkeyPatch, task, message: str
) -> None:
    monkeypatch.setattr("tests.pool.GRACE", 1.0)
    with pytest.raises(PoolError, match=message):
        pool.run(2, task, limit=5.0)
    assert pool.run(2, total, 1) == [(0, 2, 1), (1, 2, 1)]
