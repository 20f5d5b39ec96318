"""Recall across chunks: how well each mode carries (key, value) pairs to a later chunk.

    python -m benchmarks.recall [mode ...] [steps=2000 seed=0 processes=N]

Four pairs stand somewhere in the first half of a sequence, the same four keys somewhere in the
second half, and the model says the value that follows each: a small associative recall task. With
four chunks to a sequence no pair shares a chunk with its query, so `drop` can only guess. Prints
a table and writes benchmarks/results/recall.json.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks._runs import in_processes, print_table, run_benchmark
from modular_lm.config.checks import resolve_model
from modular_lm.config.load import from_dict
from modular_lm.config.schema import ModelConfig, key
from modular_lm.model.init import init_weights
from modular_lm.model.lm import IGNORE, LanguageModel

N_KEYS, N_VALUES, N_PAIRS = 16, 8, 4
SEQ_LEN, CHUNK = 32, 8
FILLER = N_KEYS + N_VALUES
VOCAB = FILLER + 1
CHANCE = 1 / N_VALUES

BATCH, LR = 48, 2e-3
TEST_SEQUENCES, TEST_SEED = 2000, 2**40

TRUNK = {"dim": 48, "n_layers": 2, "n_heads": 4, "multiple_of": 16}
SITES = {"module_seq_len": CHUNK, "module_n_layers": 1, "module_agg_dim": 48}


@dataclass(frozen=True)
class Mode:
    """A row of the table: `model.*` keys, and the accuracy that the prototype reached."""

    keys: dict[str, Any]
    prototype: float
    zero_init: bool = True


STACK: dict[str, Any] = {"module_agg": "stack"}
MODES = {
    "dense": Mode({"module_seq_len": None, "module_agg": "drop"}, 0.60),
    "drop": Mode({"module_agg": "drop"}, 0.126),
    "avg": Mode({"module_agg": "avg"}, 0.58),
    "avg_m4": Mode({"module_agg": "avg", "module_n_summary": 4}, 0.58),
    "sum": Mode({"module_agg": "sum"}, 0.60),
    "stack": Mode(STACK, 0.73),
    "stack_m4": Mode(STACK | {"module_n_summary": 4}, 1.00),
    "stack_last": Mode(STACK | {"module_pool": "last"}, 0.45),
    "stack_S4": Mode(STACK | {"module_seq_len": 4}, 0.94),
    "stack_drawn": Mode(STACK, 0.88, zero_init=False),
}


@dataclass(frozen=True)
class RecallOptions:
    steps: int = key(2000, "optimizer steps", ge=1)
    seed: int = key(0, "seed of initial weights and training data", ge=0)
    processes: int | None = key(None, "runs at a time, default: one per core", ge=1)


@dataclass(frozen=True)
class Run:
    """One model to train."""

    mode: str
    steps: int
    seed: int


@dataclass(frozen=True)
class Outcome:
    """accuracy: on new sequences, over the queries; seconds: of the training."""

    mode: str
    accuracy: float
    seconds: float


def make_batch(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """n sequences -> inputs and targets [n, SEQ_LEN]; targets are IGNORE but after a query's key.

    Keys of a sequence differ, values are drawn independently; keys, in both halves, stand at
    random even positions with their value behind, in independent orders.
    """
    keys = _choose(n, N_PAIRS, N_KEYS, generator)
    values = N_KEYS + torch.randint(N_VALUES, (n, N_PAIRS), generator=generator)
    asked = _choose(n, N_PAIRS, N_PAIRS, generator)
    half = SEQ_LEN // 2
    inputs = torch.full((n, SEQ_LEN), FILLER)
    for start, order in ((0, torch.arange(N_PAIRS).expand_as(asked)), (half, asked)):
        places = start + 2 * _choose(n, N_PAIRS, half // 2, generator)
        inputs.scatter_(1, places, keys.gather(1, order))
        inputs.scatter_(1, places + 1, values.gather(1, order))
    targets = torch.full_like(inputs, IGNORE)
    targets.scatter_(1, places, values.gather(1, asked))  # `places` of the second half
    return inputs, targets


def train(run: Run) -> Outcome:
    """Train a model on new sequences at every step, and test it on sequences it has not seen."""
    started = time.monotonic()
    mode = MODES[run.mode]
    config = from_dict(ModelConfig, TRUNK | SITES | mode.keys)
    model = LanguageModel(resolve_model(config, SEQ_LEN, VOCAB))
    init_weights(model, run.seed)
    if not mode.zero_init:
        _draw_outputs(model, run.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.95), weight_decay=0.0)
    for inputs, targets in _batches(run.steps, run.seed):
        optimizer.zero_grad()
        loss = model(inputs, targets).sum() / (targets != IGNORE).sum()
        loss.backward()
        optimizer.step()
    return Outcome(run.mode, accuracy(model), time.monotonic() - started)


@torch.no_grad()
def accuracy(model: LanguageModel) -> float:
    """The share of queries whose most likely token is the value."""
    inputs, targets = make_batch(TEST_SEQUENCES, torch.Generator().manual_seed(TEST_SEED))
    hits = model(inputs).argmax(-1) == targets
    return hits[targets != IGNORE].double().mean().item()


def _batches(steps: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        yield make_batch(BATCH, generator)


def _choose(n: int, count: int, below: int, generator: torch.Generator) -> Tensor:
    """[n, count] different numbers of 0 .. below - 1 in each row, in random order."""
    return torch.rand(n, below, generator=generator).argsort(1)[:, :count]


def _draw_outputs(model: LanguageModel, seed: int) -> None:
    """Start the sites' output projections like the other matrices instead of at zero."""
    generator = torch.Generator().manual_seed(seed)
    for site in model.aggs:
        wo = site.get_parameter("wo.weight")
        torch.nn.init.normal_(wo, std=wo.shape[1] ** -0.5, generator=generator)


def benchmark(modes: list[str], options: RecallOptions) -> dict[str, Any]:
    """Train all `modes`, print their table, return it."""
    runs = [Run(mode, options.steps, options.seed) for mode in modes]
    outcomes: list[Outcome] = []

    def rows() -> Iterator[tuple[str, ...]]:
        for outcome in in_processes(train, runs, options.processes):
            outcomes.append(outcome)
            prototype = MODES[outcome.mode].prototype
            shown = f"{outcome.accuracy:.3f}", f"{prototype:.3f}", f"{outcome.seconds:.0f}"
            yield outcome.mode, *shown

    print_table(("mode", "accuracy", "prototype", "seconds"), rows())
    print(f"chance: {CHANCE}")
    return {"outcomes": [asdict(o) | {"prototype": MODES[o.mode].prototype} for o in outcomes]}


if __name__ == "__main__":
    run_benchmark("recall", RecallOptions, MODES, benchmark, __doc__ or "")
