"""Ray Data as the feed of the training workers: plan -> parallel reads -> ordered blocks -> ranks.

The driver describes the stream by a few integers (`Stream`); `ray.data.range` numbers its
deliveries, a map reads each, and `streaming_split` hands delivery j to rank j % world_size. A
delivery is the rows of one rank for a few consecutive steps. It travels as ONE row of one block,
so that Ray Data cannot split or rebalance it: the splitter gives the next block to the rank with
the fewest rows (the lowest one of several), which is then round robin by construction. Every
delivery carries its global sample indices and `deliveries_to_steps` checks them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
import ray.data
import ray.train

from modular_lm.data.dataset import Dataset, StepRows, rank_range
from modular_lm.errors import ConfigError
from modular_lm.train.run import Run

DATASET = "train"
_TOKENS_PER_DELIVERY = 1 << 20  # STACK: below this the cost of a task shows
_MAX_DELIVERIES = 2_000  # ray.data.range takes about 3 ms for each before the first arrives
_MAX_TOKENS_PER_DELIVERY = 1 << 25  # a few of them are held in memory at a time


@dataclass(frozen=True)
class Stream:
    """Steps start..stop-1 for `world_size` ranks, `steps_per_delivery` steps at a time."""

    start: int
    stop: int
    world_size: int
    global_batch_size: int
    steps_per_delivery: int

    @classmethod
    def plan(
        cls, start: int, stop: int, world_size: int, global_batch_size: int, seq_len: int
    ) -> Stream:
        """Choose the size of a delivery: large enough to be cheap, few enough to start quickly.

        Raises ConfigError for more tokens than one stream carries.
        """
        rank_tokens = max(1, global_batch_size * seq_len // world_size)
        cheap = max(1, _TOKENS_PER_DELIVERY // rank_tokens)
        few = math.ceil((stop - start) * world_size / _MAX_DELIVERIES)
        # At least a few deliveries a rank, so that reading goes on beside training.
        early = max(1, (stop - start) // 8)
        steps = max(min(cheap, early), few)
        if steps * rank_tokens > _MAX_TOKENS_PER_DELIVERY and steps > 1:
            largest = max(1, _MAX_TOKENS_PER_DELIVERY // rank_tokens)
            reach = start + max(1, _MAX_DELIVERIES // world_size) * largest
            raise ConfigError(
                f"steps={stop}: more than one command can stream to {world_size} workers in this "
                f"version; go in stages: stop_at={reach}, then the same command with a later one"
            )
        return cls(start, stop, world_size, global_batch_size, steps)

    @property
    def deliveries(self) -> int:
        return math.ceil((self.stop - self.start) / self.steps_per_delivery) * self.world_size

    def steps_of(self, delivery: int) -> tuple[range, int]:
        """The steps of a delivery and the rank it is for."""
        turn, rank = divmod(delivery, self.world_size)
        first = self.start + turn * self.steps_per_delivery
        return range(first, min(first + self.steps_per_delivery, self.stop)), rank


class ReadDelivery:
    """Ray Data's map function: block {"id": [delivery]} -> its rows as one row of bytes."""

    def __init__(self, dataset: Dataset, stream: Stream) -> None:
        self._dataset = dataset
        self._stream = stream

    def __call__(self, block: dict[str, np.ndarray]) -> dict[str, list[Any]]:
        (delivery,) = block["id"]
        steps, rank = self._stream.steps_of(int(delivery))
        batch = (self._stream.global_batch_size, rank, self._stream.world_size)
        index = np.concatenate([np.arange(*rank_range(s, *batch), dtype=np.int64) for s in steps])
        tokens = self._dataset.read(index)
        return {
            "first_step": [steps.start],
            "index": [index.tobytes()],
            "tokens": [tokens.tobytes()],
            "dtype": [tokens.dtype.str],
        }


class PlanDataConfig(ray.train.DataConfig):
    """Builds the stream when a worker group starts: then world size and start step are known.

    Each worker group is an attempt of the run: its start step is decided, and recorded, here. No
    stream is made where nothing is left to do.
    """

    def __init__(self, run: Run) -> None:
        super().__init__()
        self._run = run

    def configure(
        self,
        datasets: dict[str, Any],
        world_size: int,
        worker_handles: Any,
        worker_node_ids: Any,
        **kwargs: Any,
    ) -> list[dict[str, Any]]:
        run = self._run
        names = {node["NodeID"]: node["NodeManagerHostname"] for node in ray.nodes()}
        start = run.begin_attempt([names[node] for node in worker_node_ids])
        if start >= run.stop_step:
            return [dict.fromkeys(datasets)] * world_size
        dataset = run.dataset
        stream = Stream.plan(
            start, run.stop_step, world_size, run.global_batch_size, dataset.seq_len
        )
        iterators = stream_iterators(dataset, stream)
        return [dict.fromkeys(datasets, iterators[rank]) for rank in range(world_size)]


def stream_iterators(dataset: Dataset, stream: Stream) -> list[Any]:
    """One Ray Data iterator of deliveries for each rank."""
    options = ray.data.ExecutionOptions()
    options.preserve_order = True
    numbers = ray.data.range(stream.deliveries, override_num_blocks=stream.deliveries)
    read: Any = ReadDelivery(dataset, stream)
    deliveries = numbers.map_batches(read, batch_size=None, batch_format="numpy")
    deliveries.context.execution_options = options
    return deliveries.streaming_split(stream.world_size, equal=False)


def deliveries_to_steps(
    deliveries: Iterable[dict[str, Any]],
    *,
    seq_len: int,
    global_batch_size: int,
    rank: int,
    world_size: int,
) -> Iterator[StepRows]:
    """Unpack deliveries (each a batch of one row) into the rows of single steps."""
    for delivery in deliveries:
        step = int(delivery["first_step"][0])
        index = np.frombuffer(delivery["index"][0], np.int64)
        tokens = np.frombuffer(delivery["tokens"][0], np.dtype(str(delivery["dtype"][0])))
        tokens = tokens.reshape(len(index), seq_len + 1)
        taken = 0
        while taken < len(index):
            first, last = rank_range(step, global_batch_size, rank, world_size)
            n = last - first
            yield StepRows(step, index[taken : taken + n], tokens[taken : taken + n])
            taken, step = taken + n, step + 1
