"""A small stream over the built-in corpus, for tests of what carries it."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from modular_lm.config.schema import DataConfig, TokenizerConfig
from modular_lm.data.dataset import Dataset
from modular_lm.tokenizer import build_tokenizer

if TYPE_CHECKING:
    from ray_jobs._ingest import Stream

SEQ_LEN, BATCH = 64, 10


def feed() -> Dataset:
    """The data set; prepared first if need be."""
    config = DataConfig(sources={"builtin": 1.0}, seq_len=SEQ_LEN, seed=1)
    return Dataset(config, build_tokenizer(TokenizerConfig()), BATCH)


def small_stream(start: int, stop: int, world_size: int) -> Stream:
    """Two steps a delivery, three deliveries a segment, two segments an execution."""
    from ray_jobs._ingest import Stream

    return dataclasses.replace(
        Stream.plan(start, stop, world_size, BATCH, SEQ_LEN),
        steps_per_delivery=2,
        deliveries_per_segment=3,
        segments_per_execution=2,
    )
