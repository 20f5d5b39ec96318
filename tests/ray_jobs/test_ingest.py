"""Ray Data delivers what the plan says, to the rank it is for, in order."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.data import Counted
from modular_lm.data.dataset import Dataset, LocalLoader, StepRows
from tests.ray_jobs.feed import BATCH, SEQ_LEN, feed, small_stream
from tests.support import reading_tasks, wait_until


@given(
    st.integers(0, 50), st.integers(1, 3000), st.integers(1, 64), st.integers(1, 4096),
    st.sampled_from([64, 2048, 8192]), st.integers(1, 5), st.integers(1, 3),
)  # fmt: skip
@settings(deadline=None, max_examples=200)
def test_deliveries_cover_every_step_once_in_order(
    start: int, steps: int, world_size: int, batch: int, seq_len: int, per: int, segments: int
) -> None:
    from ray_jobs._ingest import Stream

    stream = dataclasses.replace(
        Stream.plan(start, start + steps, world_size, batch, seq_len),
        deliveries_per_segment=per,
        segments_per_execution=segments,
    )
    rank_tokens = max(1, batch * seq_len // world_size)
    assert stream.steps_per_delivery * rank_tokens <= max(1 << 22, rank_tokens)
    executions = list(stream.executions())
    assert all(1 <= len(execution) <= segments for execution in executions)
    met: list[int] = []
    for segment in itertools.chain(*executions):
        deliveries = list(stream.deliveries_of(segment))
        assert 1 <= len(deliveries) <= per
        met += itertools.chain(*deliveries)
    assert met == list(range(start, start + steps))


def test_what_starts_at_once_does_not_grow_with_the_run() -> None:
    from ray_jobs._ingest import Stream

    stream = Stream.plan(0, 10**9, 8, 512, 4096)
    first = next(stream.executions())
    assert (len(first), len(list(stream.deliveries_of(0)))) == (16, 16)


@pytest.fixture(scope="module")
def dataset(ray_session_joined: None, cache: object) -> Dataset:
    return feed()


@pytest.mark.slow
@pytest.mark.e2e
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_the_stream_equals_the_local_loader(dataset: Dataset, world_size: int) -> None:
    """Over several segments and executions, of which the last are ragged."""
    from ray_jobs._ingest import ReadAhead

    start, stop = 5, 5 + 23 * 2 + 1
    stream = small_stream(start, stop, world_size)

    def receive(rank: int) -> list[StepRows]:
        return list(ReadAhead(dataset, stream, rank))

    with ThreadPoolExecutor(world_size) as pool:
        received = list(pool.map(receive, range(world_size)))
    for rank, steps in enumerate(received):
        assert_same(steps, LocalLoader(dataset, BATCH, rank, world_size).steps(start, stop))


@pytest.mark.slow
@pytest.mark.e2e
@pytest.mark.timeout(120)
def test_what_is_read_ahead_is_bounded(dataset: Dataset, tmp_path: Path) -> None:
    """Ray Data's budget, its generator and its iterator hold eight deliveries at most."""
    from ray_jobs._ingest import ReadAhead

    file = tmp_path / "reads"
    stream = dataclasses.replace(
        small_stream(0, 40_000, 1),
        steps_per_delivery=200,
        deliveries_per_segment=8,
        segments_per_execution=8,
    )
    reading: Any = Counted(dataset, str(file))
    with contextlib.closing(ReadAhead(reading, stream, 0)) as steps:
        for taken in range(1, 31):
            assert len(list(itertools.islice(steps, 200))) == 200
            wait_until(lambda at=taken + 2: file.stat().st_size >= at, "reading ahead", 30)
            assert file.stat().st_size <= taken + 8


@pytest.mark.slow
@pytest.mark.e2e
@pytest.mark.timeout(120)
def test_the_loop_of_ray_data_rests_while_nobody_waits(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would else take the interpreter from the trainer: thousands of rounds a second."""
    from ray_jobs import _ingest

    rounds, rest = [], _ingest.Resting.on_execution_step

    def counted(self: Any, executor: Any) -> None:
        rounds.append(time.monotonic())
        rest(self, executor)

    monkeypatch.setattr(_ingest.Resting, "on_execution_step", counted)
    with contextlib.closing(_ingest.ReadAhead(dataset, small_stream(0, 10_000, 1), 0)) as steps:
        next(steps)
        # The round in which the delivery came may have been before anybody rested.
        first = len(rounds) + 1
        wait_until(lambda: len(rounds) > first + 4, "rounds of the loop", 60)
        assert rounds[first + 4] - rounds[first] > 3.5 * _ingest._REST_S


@pytest.mark.slow
@pytest.mark.e2e
@pytest.mark.timeout(120)
def test_whoever_waits_wakes_the_loop(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over several executions and to the end, and whoever closes: no rest ends by itself here."""
    from ray_jobs import _ingest

    monkeypatch.setattr(_ingest, "_REST_S", 1000.0)
    stop = 5 + 23 * 2 + 1
    received = list(_ingest.ReadAhead(dataset, small_stream(5, stop, 1), 0))
    assert_same(received, LocalLoader(dataset, BATCH, 0, 1).steps(5, stop))
    with contextlib.closing(_ingest.ReadAhead(dataset, small_stream(0, 10_000, 1), 0)) as steps:
        next(steps)


@pytest.mark.slow
@pytest.mark.e2e
@pytest.mark.timeout(120)
@pytest.mark.parametrize("taken", [0, 1, 11])
def test_closing_a_stream_ends_all_that_reads(
    dataset: Dataset, ray_head: dict[str, str], taken: int
) -> None:
    """Unread, in the first execution, and where the second has begun beside it."""
    from ray_jobs._ingest import ReadAhead

    def at_work() -> list[str]:
        threads = [thread.name for thread in threading.enumerate()]
        ours = ("StreamingExecutor", "iter_threaded", "ingest")
        return [n for n in threads if n.startswith(ours)] + list(map(str, reading_tasks(ray_head)))

    wait_until(lambda: not at_work(), "the end of what read before", 30)
    with contextlib.closing(ReadAhead(dataset, small_stream(0, 10_000, 1), 0)) as steps:
        assert len(list(itertools.islice(steps, taken))) == taken
        assert at_work()
    wait_until(lambda: not at_work(), "the end of all that reads", 30)


def assert_same(steps: list[StepRows], expected: Iterator[StepRows]) -> None:
    for got, wanted in itertools.zip_longest(steps, expected):
        assert got.step == wanted.step
        assert np.array_equal(got.index, wanted.index)
        assert np.array_equal(got.tokens, wanted.tokens)
        assert got.tokens.shape == (len(got.index), SEQ_LEN + 1)
