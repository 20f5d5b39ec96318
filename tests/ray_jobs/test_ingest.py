"""Ray Data delivers what the plan says, to the rank it is for, in order."""

from __future__ import annotations

import dataclasses
import itertools
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modular_lm.config.schema import DataConfig, TokenizerConfig
from modular_lm.data.dataset import Dataset, LocalLoader, StepRows
from modular_lm.errors import ConfigError
from modular_lm.tokenizer import build_tokenizer

SEQ_LEN, BATCH = 64, 10


@given(
    st.integers(0, 50), st.integers(1, 3000), st.integers(1, 64), st.integers(1, 4096),
    st.sampled_from([64, 2048, 8192]),
)  # fmt: skip
@settings(deadline=None, max_examples=200)
def test_deliveries_cover_every_step_of_every_rank_once(
    start: int, steps: int, world_size: int, batch: int, seq_len: int
) -> None:
    from ray_jobs._ingest import Stream

    try:
        stream = Stream.plan(start, start + steps, world_size, batch, seq_len)
    except ConfigError as error:
        # Too much for one stream: the stage that the message proposes must be possible.
        found = re.search(r"stop_at=(\d+)", str(error))
        assert found is not None
        reach = int(found[1])
        assert start < reach < start + steps
        steps = reach - start
        stream = Stream.plan(start, reach, world_size, batch, seq_len)
    rank_tokens = batch * seq_len // world_size
    assert stream.steps_per_delivery * rank_tokens <= max(1 << 25, rank_tokens)
    met: dict[int, list[int]] = {rank: [] for rank in range(world_size)}
    for delivery in range(stream.deliveries):
        covered, rank = stream.steps_of(delivery)
        assert rank == delivery % world_size
        met[rank] += covered
    assert all(met[rank] == list(range(start, start + steps)) for rank in met)
    assert stream.deliveries <= 2000 + world_size


@pytest.fixture(scope="module")
def dataset(ray_session_joined: None, cache: Path) -> Dataset:
    config = DataConfig(sources={"builtin": 1.0}, seq_len=SEQ_LEN, seed=1)
    return Dataset(config, build_tokenizer(TokenizerConfig()))


@pytest.mark.slow
@pytest.mark.e2e
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_the_stream_equals_the_local_loader(dataset: Dataset, world_size: int) -> None:
    from ray_jobs._ingest import Stream, deliveries_to_steps, stream_iterators

    start, stop = 5, 29
    stream = dataclasses.replace(
        Stream.plan(start, stop, world_size, BATCH, SEQ_LEN), steps_per_delivery=7
    )
    iterators = stream_iterators(dataset, stream)

    def receive(rank: int) -> list[StepRows]:
        deliveries = iterators[rank].iter_batches(batch_size=None, batch_format="numpy")
        return list(
            deliveries_to_steps(
                deliveries,
                seq_len=SEQ_LEN,
                global_batch_size=BATCH,
                rank=rank,
                world_size=world_size,
            )
        )

    with ThreadPoolExecutor(world_size) as pool:
        received = list(pool.map(receive, range(world_size)))
    for rank, steps in enumerate(received):
        local = LocalLoader(dataset, BATCH, rank, world_size).steps(start, stop)
        for got, expected in itertools.zip_longest(steps, local):
            assert got.step == expected.step
            assert np.array_equal(got.index, expected.index)
            assert np.array_equal(got.tokens, expected.tokens)
