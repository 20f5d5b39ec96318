"""What feeds a training loop, and how fast: Ray Data against in-process, DataLoader and datasets.

    python -m benchmarks.data [mode ...] [key=value ...]

All read the same shards (default: the built-in corpus) and hand int64 tensors to one consumer:
`ray`, the stream of `ray_jobs.train`; `local`, `data.loader=local`; `dataloader`, a torch
DataLoader with two processes that reads the same samples, many at a time; `datasets`, Hugging
Face's library streaming the same tokens from the same Parquet files through its shuffle buffer;
`datasets_scan`, the same in its fastest format and without any shuffling. They take turns; start-up
(until the first batch, Ray and imports being warm) and steady state are apart, and the ratios are
those within a round. Prints tables and writes benchmarks/results/data.json.

    python -m benchmarks.data ahead         how far Ray Data reads ahead; waits at its borders
    python -m benchmarks.data wait          the share of time a model of 10 M parameters waits
"""

from __future__ import annotations

import dataclasses
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from benchmarks._runs import open_source, print_table, run_benchmark
from modular_lm.config.schema import TokenizerConfig, key
from modular_lm.data.dataset import Dataset, LocalLoader
from modular_lm.tracking.run_folder import RunFolder

if TYPE_CHECKING:
    from ray_jobs._ingest import Stream

Start = Callable[[int], Generator[torch.Tensor]]
MODES = ("ray", "local", "dataloader", "datasets", "datasets_scan")
WHAT = __doc__ or ""
WAIT_JOB = [
    "config=configs/debug.yaml", "steps=14", "model.dim=320", "model.n_layers=8", "model.n_heads=5",
    "data.seq_len=256", "data.batch_size=2", "model.module_seq_len=64", "logging.freq=1",
    "logging.mlflow.enabled=false", "checkpoint.dump.every=0", "checkpoint.eval.every=0",
    "eval.validation.max_docs=0",
]  # fmt: skip


@dataclass
class Options:
    seq_len: int = key(2048, "tokens per sample", ge=1)
    step_samples: int = key(64, "samples of a step", ge=1)
    steady_tokens: int = key(256_000_000, "tokens read after the start", ge=1)
    dataloader_tokens: int = key(
        1 << 21, "tokens that a process of the DataLoader reads at once", ge=1
    )
    rounds: int = key(3, "how often each takes its turn", ge=1)
    root_dir: str | None = key(None, "folder of prepared sources; default: the built-in corpus")
    source: str = key("builtin", "name of the source")
    tokenizer: TokenizerConfig = key(TokenizerConfig, "tokenizer of the source")


# ------------------------------------------------------------------ what feeds


def feeds(options: Options, data: Dataset) -> dict[str, Start]:
    """Each as a function that starts it for so many steps: batches of int64 tokens
    [n, seq_len + 1]."""
    return {
        "ray": lambda steps: ray_data(options, data, steps),
        "local": lambda steps: local(options, data, steps),
        "dataloader": lambda steps: dataloader(options, data, steps),
        "datasets": lambda steps: hugging_face(options, data),
        "datasets_scan": lambda steps: hugging_face_scan(options, data),
    }


def ray_data(options: Options, data: Dataset, steps: int) -> Generator[torch.Tensor]:
    from ray_jobs._ingest import ReadAhead, Stream

    stream = Stream.plan(0, steps, 1, options.step_samples, options.seq_len)
    batches = ReadAhead(data, stream, 0)
    try:
        for rows in batches:
            yield as_tensor(rows.tokens)
    finally:
        # To close it early would end a process, whose successor would start up in the next turn.
        for _ in batches:
            pass


def local(options: Options, data: Dataset, steps: int) -> Generator[torch.Tensor]:
    for rows in LocalLoader(data, options.step_samples, 0, 1).steps(0, steps):
        yield as_tensor(rows.tokens)


class Deliveries(torch.utils.data.IterableDataset):
    """The deliveries of the stream, dealt to the processes of a DataLoader in turn."""

    def __init__(self, options: Options, data: Dataset, steps: int) -> None:
        self._data, self._samples, self._steps = data, options.step_samples, steps
        step_tokens = options.step_samples * options.seq_len
        self._per_delivery = max(1, options.dataloader_tokens // step_tokens)

    def __iter__(self) -> Iterator[torch.Tensor]:
        worker = torch.utils.data.get_worker_info()
        assert worker is not None
        size = self._per_delivery * self._samples
        stop = self._steps * self._samples
        for first in range(worker.id * size, stop, worker.num_workers * size):
            yield as_tensor(self._data.read(np.arange(first, min(first + size, stop))))


def dataloader(options: Options, data: Dataset, steps: int) -> Generator[torch.Tensor]:
    loader = torch.utils.data.DataLoader(
        Deliveries(options, data, steps), batch_size=None, num_workers=2
    )
    for delivery in loader:
        yield from delivery.split(options.step_samples)


def hugging_face(options: Options, data: Dataset) -> Generator[torch.Tensor]:
    """Rows of 1,024 tokens shuffled in its buffer, then joined and cut into samples: the way to
    train with it."""
    dtype = np.uint16 if data.token_bytes == 2 else np.uint32
    size, left, held = options.step_samples * options.seq_len + 1, [], 0
    while True:
        for row in _parquet(data).shuffle(seed=1, buffer_size=10_000):
            left.append(np.frombuffer(row["tokens"], dtype))
            held += len(left[-1])
            if held >= size:
                tokens = np.concatenate(left)
                yield _samples(tokens, options)
                left, held = [tokens[size - 1 :]], held - size + 1


def hugging_face_scan(options: Options, data: Dataset) -> Generator[torch.Tensor]:
    """The same rows in the order of the files, in its fastest format."""
    dtype = np.uint16 if data.token_bytes == 2 else np.uint32
    size, left = options.step_samples * options.seq_len + 1, np.empty(0, dtype)
    while True:
        for table in _parquet(data).with_format("arrow").iter(batch_size=1024):
            rows = table["tokens"].combine_chunks().to_pylist()
            left = np.concatenate([left, np.frombuffer(b"".join(rows), dtype)])
            while len(left) >= size:
                yield _samples(left, options)
                left = left[size - 1 :]


def _parquet(data: Dataset) -> Any:
    from datasets import load_dataset  # pyright: ignore[reportMissingImports]

    (folder,) = data.folders.values()
    files = sorted(str(file) for file in folder.glob("train-*.parquet"))
    return load_dataset("parquet", data_files=files, split="train", streaming=True)


def _samples(tokens: np.ndarray, options: Options) -> torch.Tensor:
    """The first step of a stream of tokens: windows that overlap by one."""
    shape = (options.step_samples, options.seq_len + 1)
    strides = (options.seq_len * tokens.itemsize, tokens.itemsize)
    return as_tensor(np.lib.stride_tricks.as_strided(tokens, shape, strides))


def as_tensor(tokens: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(tokens.astype(np.int64))


# ------------------------------------------------------------------ measuring


def measure(start: Start, tokens: int, step_tokens: int) -> tuple[float, float]:
    """Seconds until the first batch; then tokens per second until `tokens` have come."""
    began = time.perf_counter()
    batches = start(tokens * 5 // 4 // step_tokens + 2)
    first = next(batches)
    ready = time.perf_counter() - began
    # What was read ahead while waiting for the first batch is not steady state.
    skipped = first.numel()
    for batch in batches:
        skipped += batch.numel()
        if skipped > tokens / 8:
            break
    began, seen = time.perf_counter(), 0
    for batch in batches:
        seen += batch[:, 1:].numel()
        if seen >= tokens:
            break
    rate = seen / (time.perf_counter() - began)
    batches.close()
    return ready, rate


def compare(names: list[str], options: Options) -> dict[str, Any]:
    data = open_data(options)
    start, step_tokens = feeds(options, data), options.step_samples * options.seq_len
    ready: dict[str, list[float]] = {name: [] for name in names}
    speed: dict[str, list[float]] = {name: [] for name in names}
    for round_ in range(-1, options.rounds):
        for name in names:
            # The first round warms up: worker processes, imports, page cache.
            tokens = options.steady_tokens if round_ >= 0 else options.steady_tokens // 16
            seconds, rate = measure(start[name], tokens, step_tokens)
            if round_ >= 0:
                ready[name].append(seconds)
                speed[name].append(rate)
    others = [name for name in names if name != "ray"]
    print_table(
        ["feed", "first batch (s)", "Mtok/s", "ray / it"], rows(names, ready, speed, others)
    )
    return {"first_batch_seconds": ready, "tokens_per_second": speed}


def rows(
    names: list[str],
    ready: dict[str, list[float]],
    speed: dict[str, list[float]],
    others: list[str],
) -> Iterator[list[str]]:
    for name in names:
        ratio = ""
        if name in others and "ray" in speed:
            ratios = [a / b for a, b in zip(speed["ray"], speed[name], strict=True)]
            ratio = f"{statistics.median(ratios):.2f} ({min(ratios):.2f}..{max(ratios):.2f})"
        first = f"{statistics.median(ready[name]):.2f} (max {max(ready[name]):.2f})"
        yield [name, first, f"{statistics.median(speed[name]) / 1e6:.1f}", ratio]


def open_data(options: Options) -> Dataset:
    o = options
    return open_source(o.source, o.root_dir, o.tokenizer, o.seq_len, o.step_samples)


# ------------------------------------------------------------------ reading ahead, waiting


@dataclass
class Counted:
    """A Dataset that leaves a byte in a file for each delivery it reads, in whatever process."""

    data: Dataset
    file: str

    @property
    def seq_len(self) -> int:
        return self.data.seq_len

    @property
    def token_bytes(self) -> int:
        return self.data.token_bytes

    def read(self, index: np.ndarray) -> np.ndarray:
        with open(self.file, "ab") as stream:
            stream.write(b".")
        return self.data.read(index)


def ahead(options: Options) -> dict[str, Any]:
    """For a consumer slower than the disk: deliveries that were read and not yet taken, at most;
    and how long it waits for those after a border of segments or executions, and for others."""
    from ray_jobs._ingest import ReadAhead, Stream

    data = open_data(options)
    plan = Stream.plan(0, 10**6, 1, options.step_samples, options.seq_len)
    steps, segment = plan.steps_per_delivery, plan.deliveries_per_segment
    stream = dataclasses.replace(plan, stop=steps * (segment * plan.segments_per_execution + 100))
    most, waits = 0, {"neither": [], "segment": [], "execution": []}
    with tempfile.NamedTemporaryFile() as file:
        counted: Any = Counted(data, file.name)
        feed = ReadAhead(counted, stream, 0)
        for number in range(stream.stop // steps):
            asked = time.perf_counter()
            next(feed)
            if number:
                waits[_border(number, stream)].append(time.perf_counter() - asked)
            most = max(most, os.stat(file.name).st_size - number)
            for _ in range(steps - 1):
                next(feed)
            _compute(0.06)
    bytes_ = most * steps * options.step_samples * (options.seq_len + 1) * data.token_bytes
    print(f"read ahead: at most {most} deliveries of {steps:,} steps, {bytes_ / 2**20:.0f} MiB")
    print_table(
        ["a delivery that begins", "waits (ms)", "at most"],
        (
            [where, f"{statistics.median(found) * 1e3:.1f}", f"{max(found) * 1e3:.1f}"]
            for where, found in waits.items()
        ),
    )
    return {"deliveries": most, "bytes": bytes_, "waits": waits}


def _border(number: int, stream: Stream) -> str:
    """What begins with this delivery of the stream."""
    segment, within = divmod(number, stream.deliveries_per_segment)
    if within:
        return "neither"
    return "segment" if segment % stream.segments_per_execution else "execution"


def _compute(seconds: float) -> None:
    """Be busy, as a training step is."""
    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        torch.mm(torch.ones(256, 256), torch.ones(256, 256))


def wait() -> dict[str, Any]:
    """speed/data_wait of a run of 10 M parameters, its first two lines left out."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "ray_jobs.train", *WAIT_JOB, f"dump_dir={folder}/run"]
        dry = subprocess.run([*command, "dry_run=true"], check=True, capture_output=True, text=True)
        size = next(line for line in dry.stdout.splitlines() if line.startswith("parameters"))
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        lines = list(RunFolder(Path(folder) / "run").metrics)[2:]
    waits = [line["speed/data_wait"] for line in lines]
    steps = statistics.median(line["speed/curr_iter_time"] for line in lines)
    print(f"{size}; step {steps:.2f} s; waits for data: {statistics.mean(waits):.4%} of the time, "
          f"at most {max(waits):.4%} of a step")  # fmt: skip
    return {"data_wait": waits, "seconds_per_step": steps}


def benchmark(chosen: list[str], options: Options) -> dict[str, Any]:
    result: dict[str, Any] = {}
    if "wait" in chosen:
        result["wait"] = wait()
    names = [name for name in MODES if name in chosen]
    if names or "ahead" in chosen:
        from ray_jobs._session import ray_session

        with ray_session(num_cpus=4):
            if names:
                result["feeds"] = compare(names, options)
            if "ahead" in chosen:
                result["ahead"] = ahead(options)
    return result


if __name__ == "__main__":
    run_benchmark("data", Options, [*MODES, "ahead", "wait"], benchmark, WHAT)
