"""Ray Data as the feed of the training workers: plan -> reading tasks -> ordered deliveries.

A delivery is the rows of one rank for a few consecutive steps. `Stream` cuts a run into
deliveries, deliveries into segments, segments into executions, by a few integers. Each rank runs
its own executions of Ray Data, one after the other: a segment is one task, a generator that reads
delivery after delivery and pauses while the rank has enough; the next segment's task takes over
where it ends, and the next execution is started while the last segment of this one is read.

Per rank and not one execution split among all, because then there is no barrier between ranks, no
coordinator whose node may be lost, and each delivery is its rank's by construction. What is
started, queued or read again after a fault is bounded by a segment, however long the run is. Every
delivery carries its global sample indices, which the trainer checks.
"""

from __future__ import annotations

import itertools
import math
import pickle
import threading
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import ray.data
import ray.train
from ray.data._internal.execution.execution_callback import ExecutionCallback

from modular_lm.config.distributed import mesh_sizes
from modular_lm.data.dataset import Dataset, StepRows, rank_range
from modular_lm.errors import UserFacingError
from modular_lm.train.run import Run

DATASET = "train"
_TOKENS_PER_DELIVERY = 1 << 22  # below this the cost of handing over shows
# What Ray Data is told to hold for a rank, in deliveries, beside those that its generator and its
# iterator hold: `benchmarks.data ahead` counts all of them.
_QUEUED_DELIVERIES = 4
_CLOSE_TIMEOUT_S = 30
_REST_S = 0.5


@dataclass(frozen=True)
class Stream:
    """Steps start..stop-1 for `world_size` data-parallel ranks, `steps_per_delivery` at a time.

    A segment is what is read again when its task or its node dies; each segment of an execution
    adds some milliseconds to its start.
    """

    start: int
    stop: int
    world_size: int
    global_batch_size: int
    steps_per_delivery: int
    deliveries_per_segment: int = 16
    segments_per_execution: int = 16

    @classmethod
    def plan(
        cls, start: int, stop: int, world_size: int, global_batch_size: int, seq_len: int
    ) -> Stream:
        """Choose the size of a delivery: as many steps as make it cheap to hand over."""
        rank_tokens = max(1, global_batch_size * seq_len // world_size)
        cheap = max(1, _TOKENS_PER_DELIVERY // rank_tokens)
        # At least a few deliveries a rank, so that reading goes on beside training.
        early = max(1, (stop - start) // 32)
        return cls(start, stop, world_size, global_batch_size, min(cheap, early))

    @property
    def segments(self) -> int:
        """How many segments the stream of a rank has."""
        return math.ceil(self._deliveries / self.deliveries_per_segment)

    @property
    def _deliveries(self) -> int:
        return math.ceil((self.stop - self.start) / self.steps_per_delivery)

    def executions(self) -> Iterator[range]:
        """The segments of each execution, in order."""
        for first in range(0, self.segments, self.segments_per_execution):
            yield range(first, min(first + self.segments_per_execution, self.segments))

    def deliveries_of(self, segment: int) -> Iterator[range]:
        """The steps of each delivery of a segment, in order."""
        first = segment * self.deliveries_per_segment
        for number in range(first, min(first + self.deliveries_per_segment, self._deliveries)):
            step = self.start + number * self.steps_per_delivery
            yield range(step, min(step + self.steps_per_delivery, self.stop))

    def index(self, steps: range, rank: int) -> np.ndarray:
        """The global sample indices of `rank` in these steps, [n]."""
        batch = (self.global_batch_size, rank, self.world_size)
        return np.concatenate([np.arange(*rank_range(s, *batch), dtype=np.int64) for s in steps])


class ReadSegment:
    """Ray Data's map function: block {"id": [segment]} -> the deliveries of a rank in it.

    Each is yielded as one row of bytes, in a block of its own.
    """

    def __init__(self, dataset: Dataset, stream: Stream, rank: int, first: int) -> None:
        self._dataset, self._stream = dataset, stream
        self._rank, self._first = rank, first

    def __call__(self, block: dict[str, np.ndarray]) -> Iterator[pa.Table]:
        (number,) = block["id"]
        segment = self._first + int(number)
        for steps in self._stream.deliveries_of(segment):
            index = self._stream.index(steps, self._rank)
            try:
                tokens = self._dataset.read(index)
            except UserFacingError as error:
                # As a value, so that it arrives as it was raised.
                yield pa.table({"segment": [segment], "error": [pickle.dumps(error)]})
                return
            yield pa.table(
                {
                    "segment": [segment],
                    "first_step": [steps.start],
                    "index": _as_row(index),
                    "tokens": _as_row(tokens),
                    "dtype": [tokens.dtype.str],
                }
            )


def _as_row(values: np.ndarray) -> pa.Array:
    """A column whose one row is the bytes of `values`, which are not copied."""
    ends = np.array([0, values.nbytes], np.int64)
    buffers = [None, pa.py_buffer(ends), pa.py_buffer(values)]
    return pa.LargeBinaryArray.from_buffers(pa.large_binary(), 1, buffers)


def execute(dataset: Dataset, stream: Stream, rank: int, segments: range) -> Generator[pa.Table]:
    """The deliveries of an execution of Ray Data that reads these segments for `rank`.

    It begins when the first is asked for. Each is a table of one row, as `ReadSegment` yields it.
    """
    numbers = ray.data.range(len(segments), override_num_blocks=len(segments))
    read: Any = ReadSegment(dataset, stream, rank, segments.start)
    deliveries = numbers.map_batches(
        read,
        batch_size=None,
        batch_format="numpy",
        # One task at a time keeps the order of what is read ahead. It asks for no CPU, so that it
        # never waits for the workers that wait for it.
        compute=ray.data.TaskPoolStrategy(size=1),
        num_cpus=0,
    )
    context = deliveries.context
    # Blocks as they are yielded: Ray Data would join them until they are a hundred MiB.
    context.target_min_block_size = context.target_max_block_size = 1
    context.execution_options.preserve_order = True
    size = stream.index(range(stream.start, stream.start + stream.steps_per_delivery), rank).size
    limit = _QUEUED_DELIVERIES * size * (dataset.seq_len + 1) * dataset.token_bytes
    options = context.execution_options
    options.resource_limits = options.resource_limits.copy(object_store_memory=limit)
    context.custom_execution_callback_classes = [Resting]
    batches: Any = iter(
        deliveries.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=1)
    )
    return batches


class Resting(ExecutionCallback):
    """Lets Ray Data's scheduling loop rest while nobody in this process waits for a delivery.

    The loop is a thread of the training process. Once enough is read ahead it would go round
    without a pause (a task whose next block may not be taken yet counts as ready) and hold the
    interpreter's lock against the trainer.
    """

    def on_execution_step(self, executor: Any) -> None:
        """Called by Ray Data after each round of the loop."""
        _awaited.rest(_REST_S)


class _Awaited:
    """Whether something is waited for: entered by those who wait, asked by those who may rest."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._waiting = 0

    def __enter__(self) -> None:
        with self._changed:
            self._waiting += 1
            self._changed.notify_all()

    def __exit__(self, *exception: object) -> None:
        with self._changed:
            self._waiting -= 1

    def rest(self, seconds: float) -> None:
        """Return at once if anybody waits, else when somebody begins to, or after `seconds`."""
        with self._changed:
            if not self._waiting:
                self._changed.wait(seconds)


_awaited = _Awaited()


class ReadAhead(Iterator[StepRows]):
    """The rows of `rank` at each step of the stream, in order; Ray Data begins to read at once.

    What reads ends with the last row, or when this is closed: Ray Data's threads would otherwise
    outlive the Ray session, which they cannot.
    """

    def __init__(self, dataset: Dataset, stream: Stream, rank: int) -> None:
        self._executions = (
            _Execution(segments, execute(dataset, stream, rank, segments))
            for segments in stream.executions()
        )
        # The one that is read and, near its end, the one after it.
        self._open = [next(self._executions)]
        self._steps = deliveries_to_steps(self._deliveries(), stream, rank, dataset.seq_len)

    def __next__(self) -> StepRows:
        return next(self._steps)

    def close(self) -> None:
        """End what reads, at whatever point the stream is."""
        for execution in self._open:
            execution.close()

    def _deliveries(self) -> Iterator[pa.Table]:
        while self._open:
            current = self._open[0]
            for delivery in current:
                late = delivery["segment"][0].as_py() == current.segments[-1]
                if late and len(self._open) == 1:
                    self._open.extend(itertools.islice(self._executions, 1))
                yield delivery
            del self._open[0]


class _Execution:
    """An execution of Ray Data that begins here and now, in a thread that waits for its first
    delivery."""

    def __init__(self, segments: range, batches: Generator[pa.Table]) -> None:
        self.segments, self._batches = segments, batches
        pool = ThreadPoolExecutor(1, "ingest")
        self._first = pool.submit(self._next)
        pool.shutdown(wait=False)

    def __iter__(self) -> Iterator[pa.Table]:
        delivery = self._first.result()
        while delivery is not None:
            yield delivery
            delivery = self._next()

    def _next(self) -> pa.Table | None:
        with _awaited:
            return next(self._batches, None)

    def close(self) -> None:
        # A generator cannot be closed while another thread is in it.
        if wait([self._first], _CLOSE_TIMEOUT_S).done:
            with _awaited:
                self._batches.close()


class PlanDataConfig(ray.train.DataConfig):
    """Gives the workers their feed when a worker group starts: then the world size is known.

    Each worker group is an attempt of the run: its start step is decided, and recorded, here. There
    is no feed where nothing is left to do.
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
        nodes = {node["NodeID"]: node for node in ray.nodes()}
        mine = [nodes[number] for number in worker_node_ids]
        start = run.begin_attempt(
            [node["NodeManagerHostname"] for node in mine],
            [node["NodeManagerAddress"] for node in mine],
        )
        if start >= run.stop_step:
            return [dict.fromkeys(datasets)] * world_size
        batch, ranks = run.global_batch_size, mesh_sizes(run.config.distributed, world_size).data
        stream = Stream.plan(start, run.stop_step, ranks, batch, run.dataset.seq_len)
        return [dict.fromkeys(datasets, stream)] * world_size


def deliveries_to_steps(
    deliveries: Iterable[pa.Table], stream: Stream, rank: int, seq_len: int
) -> Iterator[StepRows]:
    """Unpack deliveries (each a table of one row) into the rows of single steps.

    They are views of Ray's object store, which may not be written to. Raises what a delivery
    brings instead of rows.
    """
    for delivery in deliveries:
        if "error" in delivery.column_names:
            raise pickle.loads(delivery["error"][0].as_py())
        step = delivery["first_step"][0].as_py()
        index = np.frombuffer(delivery["index"][0].as_buffer(), np.int64)
        dtype = np.dtype(delivery["dtype"][0].as_py())
        tokens = np.frombuffer(delivery["tokens"][0].as_buffer(), dtype)
        tokens = tokens.reshape(len(index), seq_len + 1)
        taken = 0
        while taken < len(index):
            first, last = rank_range(step, stream.global_batch_size, rank, stream.world_size)
            n = last - first
            yield StepRows(step, index[taken : taken + n], tokens[taken : taken + n])
            taken, step = taken + n, step + 1
