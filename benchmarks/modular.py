"""What chunks save: time and memory of training passes of each mode against a dense model.

    python -m benchmarks.modular [arm ...] [lengths=[512,4096] chunks=[64,256] rounds=3 ...]

Forward and backward of the same trunk over the same tokens, as a dense model, with a sliding
window of S, and in chunks of S with each kind of aggregation, for sequences of T tokens; all arms
of a T take turns, and each one's fastest round counts. Beside the measured speed-up over dense
stands what the FLOP formulas predict (`modular_lm.model.flops`). On a CPU one thread computes and
its CPU time is taken, which other programs disturb little; memory is the bytes of all tensors that
the backward pass keeps. On a GPU it is wall-clock time and the peak of the allocator. Prints a
table and writes benchmarks/results/modular.json.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from benchmarks._runs import print_table, run_benchmark
from modular_lm.config.checks import resolve_model
from modular_lm.config.schema import Dtype, ModelConfig, key
from modular_lm.model.attention import choose_backends
from modular_lm.model.flops import flops_per_token
from modular_lm.model.init import init_weights
from modular_lm.model.lm import LanguageModel
from modular_lm.parallel import DTYPES

VOCAB = 256

# Arm -> its `model.*` keys for chunks of S.
ARMS: dict[str, Any] = {
    "window": lambda s: {"sliding_window": s},
    "drop": lambda s: {"module_seq_len": s, "module_agg": "drop"},
    "avg": lambda s: {"module_seq_len": s, "module_agg": "avg"},
    "stack_m4": lambda s: {"module_seq_len": s, "module_agg": "stack", "module_n_summary": 4},
    "drop_lb": lambda s: ARMS["drop"](s) | {"module_lookback": s // 4},
    "stack_m4_lb": lambda s: ARMS["stack_m4"](s) | {"module_lookback": s // 4},
}


@dataclass
class Options:
    lengths: list[int] = key([512, 1024, 2048, 4096, 8192, 16384], "sequence lengths T, in tokens")
    chunks: list[int] = key([64, 256, 1024], "chunk lengths S (and windows), in tokens")
    tokens: int = key(4096, "tokens of a pass; longer sequences are one pass each", ge=1)
    rounds: int = key(2, "timed passes of each arm", ge=1)
    dim: int = key(256, "width", ge=1)
    n_layers: int = key(4, "layers", ge=1)
    dtype: Dtype = key("fp32", "type of weights and computation")
    device: str = key("cpu", "cpu or cuda")
    compile: bool = key(False, "torch.compile each layer")


@dataclass
class Cell:
    """One arm at one (T, S): what it takes, and what it should."""

    arm: str
    length: int
    chunk: int
    flops_per_token: float
    mib: float = 0.0
    seconds: list[float] = field(default_factory=list)


class Pass:
    """Forward and backward of one arm."""

    def __init__(self, options: Options, length: int, keys: dict[str, Any]) -> None:
        given = {"dim": options.dim, "n_layers": options.n_layers, "n_heads": options.dim // 64}
        self.config = resolve_model(ModelConfig(**given, **keys), length, VOCAB)
        self._device, dtype = torch.device(options.device), DTYPES[options.dtype]
        self._model = LanguageModel(self.config).to(self._device, dtype)
        init_weights(self._model, seed=0)
        self._model.backends = choose_backends(
            "auto",
            self.config,
            seq_len=length,
            document_mask=False,
            device=self._device,
            dtype=dtype,
        )
        if options.compile:
            for unit in [*self._model.layers, *self._model.aggs]:
                unit.compile()
        rows = max(1, options.tokens // length)
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(VOCAB, (rows, length + 1), generator=generator).to(self._device)
        self._inputs, self._targets = tokens[:, :-1], tokens[:, 1:]

    def run(self) -> float:
        """Seconds of a pass."""
        clock = time.perf_counter if self._device.type == "cuda" else time.process_time
        self._wait()
        began = clock()
        self._model(self._inputs, self._targets).mean().backward()
        self._wait()
        seconds = clock() - began
        self._model.zero_grad(set_to_none=True)
        return seconds

    def mib(self) -> float:
        """Memory of a pass; it is a warm-up, too."""
        if self._device.type == "cuda":
            self.run()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            self.run()
            return (torch.cuda.max_memory_allocated() - before) / 2**20
        weights = {p.untyped_storage().data_ptr() for p in self._model.parameters()}
        saved: dict[int, int] = {}

        def pack(x: torch.Tensor) -> torch.Tensor:
            storage = x.untyped_storage()
            if storage.data_ptr() not in weights:
                saved[storage.data_ptr()] = storage.nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            self.run()
        return sum(saved.values()) / 2**20

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize()


def measure(arms: list[str], options: Options, length: int) -> list[Cell]:
    """All arms at one T, in turns; the dense model first."""
    chosen: list[tuple[str, int, dict[str, Any]]] = [("dense", length, {"module_agg": "drop"})]
    chosen += [(a, s, ARMS[a](s)) for s in options.chunks if s < length for a in arms]
    cells = []
    for round_ in range(options.rounds):
        for number, (arm, chunk, keys) in enumerate(chosen):
            one = Pass(options, length, keys)
            if round_ == 0:
                cells.append(Cell(arm, length, chunk, flops_per_token(one.config, length)))
                cells[number].mib = one.mib()
            cells[number].seconds.append(one.run())
    return cells


def rows(cells_of: dict[int, list[Cell]]) -> Iterator[list[str]]:
    """The lines of the table."""
    for length, (dense, *others) in cells_of.items():
        for cell in [dense, *others]:
            speed_up = min(dense.seconds) / min(cell.seconds)
            predicted = dense.flops_per_token / cell.flops_per_token
            yield [
                cell.arm,
                str(length),
                "-" if cell is dense else str(cell.chunk),
                f"{min(cell.seconds):.3f}",
                f"{speed_up:.2f}",
                f"{predicted:.2f}",
                f"{speed_up / predicted:.2f}",
                f"{cell.mib:.0f}",
                f"{cell.mib / dense.mib:.2f}",
            ]


def benchmark(arms: list[str], options: Options) -> dict[str, Any]:
    """Measure and print; returns what is written."""
    if options.device == "cpu":
        torch.set_num_threads(1)
    header = ["arm", "T", "S", "s/pass", "faster", "FLOPs", "ratio", "MiB", "of dense"]
    measured: dict[int, list[Cell]] = {}

    def lines() -> Iterator[list[str]]:
        for length in options.lengths:
            measured[length] = measure(arms, options, length)
            yield from rows({length: measured[length]})

    print_table(header, lines())
    return {"cells": [asdict(cell) for cells in measured.values() for cell in cells]}


if __name__ == "__main__":
    run_benchmark("modular", Options, ARMS, benchmark, __doc__ or "")
