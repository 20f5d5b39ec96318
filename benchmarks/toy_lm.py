"""A toy language model in every mode: 0.49 M parameters, 1.0 M bytes of Python source.

    python -m benchmarks.toy_lm [mode ...] [steps=490 seeds=2 lr=4e-3 processes=N]

Trains each mode on the same samples of the built-in corpus in the same order, from the same trunk
weights, and scores it on held-out text: by position in the chunk, and on sequences four times as
long as those of the training. Prints a table and writes benchmarks/results/toy_lm.json.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from time import monotonic
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks._runs import in_processes, print_table, run_benchmark
from modular_lm.config.checks import resolve_model
from modular_lm.config.load import from_dict
from modular_lm.config.schema import DataConfig, ModelConfig, OptimConfig, TokenizerConfig, key
from modular_lm.data.builtin import ensure_builtin
from modular_lm.data.dataset import Dataset, LocalLoader
from modular_lm.data.reader import SourceReader
from modular_lm.model.init import init_weights
from modular_lm.model.lm import LanguageModel
from modular_lm.optim import build_optimizers, learning_rate
from modular_lm.tokenizer import build_tokenizer

SEQ_LEN, CHUNK, LONGER = 256, 16, 4
SHOWN_POSITIONS = (0, 3, 15)

NO_CHUNKS: dict[str, Any] = {"module_seq_len": None, "module_agg": "drop"}
STACK_M4: dict[str, Any] = {"module_agg": "stack", "module_n_summary": 4}


@dataclass(frozen=True)
class Mode:
    """A row of the table: `model.*` keys, and the prototype's numbers (nats per byte).

    prototype: validation of its first seed; prototype_long: the last quarter of long sequences
    """

    keys: dict[str, Any]
    prototype: float | None
    prototype_long: float | None


MODES = {
    "dense": Mode(NO_CHUNKS, 1.681, None),
    "window": Mode(NO_CHUNKS | {"sliding_window": CHUNK}, 1.584, 1.522),
    "drop": Mode({"module_agg": "drop"}, 1.747, 1.702),
    "raw_sum": Mode({"module_agg": "sum", "module_sum_scale": 1.0}, 1.795, 2.937),
    "sum": Mode({"module_agg": "sum"}, 1.731, 2.04),
    "avg": Mode({"module_agg": "avg"}, 1.733, 1.690),
    "stack": Mode({"module_agg": "stack"}, 1.710, 1.699),
    "stack_m4": Mode(STACK_M4, 1.700, 1.698),
    "drop_lookback": Mode({"module_agg": "drop", "module_lookback": 4}, 1.586, 1.528),
    "stack_m4_lookback": Mode(STACK_M4 | {"module_lookback": 4}, None, None),
}


@dataclass(frozen=True)
class ToyOptions:
    steps: int = key(490, "optimizer steps of 8 x 256 tokens", ge=1)
    seeds: int = key(2, "runs per mode, with seeds 0, 1, ...", ge=1)
    lr: float = key(4e-3, "peak learning rate", gt=0)
    processes: int | None = key(None, "runs at a time, default: one per core", ge=1)


@dataclass(frozen=True)
class Run:
    """One model to train; seed: of its initial weights and of the order of its data."""

    mode: str
    seed: int
    steps: int
    lr: float = 4e-3
    dim: int = 96
    n_layers: int = 4
    batch_size: int = 8


@dataclass(frozen=True)
class Outcome:
    """Mean losses on held-out text, in nats per byte, all over the same text.

    nll: cut into samples as in training
    last: that of the targets that are the last quarter of the long sequences
    long_first, long_last: the first and last quarter of each long sequence, scored in one piece
    by_position: [CHUNK], by position in the chunk, without the first chunk, which reads nothing
    """

    run: Run
    parameters: int
    nll: float
    last: float
    long_first: float
    long_last: float
    by_position: list[float]
    seconds: float


def train_and_score(run: Run) -> Outcome:
    """Train the model of `run` and score it."""
    started = monotonic()
    tokenizer = build_tokenizer(TokenizerConfig())
    model = _build(run, tokenizer.n_words)
    data = Dataset(DataConfig(seq_len=SEQ_LEN, seed=run.seed), tokenizer, run.batch_size)
    _train(model, LocalLoader(data, run.batch_size, rank=0, world_size=1), run)
    return Outcome(
        run=run,
        parameters=sum(p.numel() for p in model.parameters()),
        **score(model, held_out()),
        seconds=monotonic() - started,
    )


def held_out(n: int = 128) -> Tensor:
    """n long sequences, spread evenly over the held-out text: [n, LONGER * SEQ_LEN + 1]."""
    reader = SourceReader(ensure_builtin(TokenizerConfig()), "val")
    length = LONGER * SEQ_LEN
    positions = np.linspace(0, reader.n_windows(length) - 1, n).astype(np.int64)
    return torch.from_numpy(reader.windows(positions, length).astype(np.int64))


@torch.no_grad()
def score(model: LanguageModel, sequences: Tensor) -> dict[str, Any]:
    """The losses of an `Outcome`; sequences: [n, LONGER * SEQ_LEN + 1]."""
    pieces = sequences.unfold(1, SEQ_LEN + 1, SEQ_LEN).flatten(0, 1)
    short = _losses(model, pieces).unflatten(0, (-1, LONGER))  # [n, LONGER, SEQ_LEN]
    long = _losses(model, sequences).view_as(short)
    by_position = short[..., CHUNK:].unflatten(-1, (-1, CHUNK)).mean((0, 1, 2))
    return {
        "nll": short.mean().item(),
        "last": short[:, -1].mean().item(),
        "long_first": long[:, 0].mean().item(),
        "long_last": long[:, -1].mean().item(),
        "by_position": by_position.tolist(),
    }


def _build(run: Run, vocab_size: int) -> LanguageModel:
    trunk = {"dim": run.dim, "n_layers": run.n_layers, "n_heads": 4, "multiple_of": 32}
    keys = trunk | {"module_seq_len": CHUNK, "module_n_layers": 1} | MODES[run.mode].keys
    model = LanguageModel(resolve_model(from_dict(ModelConfig, keys), SEQ_LEN, vocab_size))
    init_weights(model, run.seed)
    return model


def _train(model: LanguageModel, loader: LocalLoader, run: Run) -> None:
    config = OptimConfig(lr=run.lr, warmup=run.steps // 10)
    optimizers = build_optimizers(model, config)
    for rows in loader.steps(0, run.steps):
        optimizers.set_learning_rate(learning_rate(config, run.steps, rows.step))
        tokens = torch.from_numpy(rows.tokens.astype(np.int64))
        optimizers.zero_grad()
        model(tokens[:, :-1], tokens[:, 1:]).mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        optimizers.step()


def _losses(model: LanguageModel, sequences: Tensor) -> Tensor:
    """[n, T + 1] -> [n, T] in fp64, a few thousand tokens at a time."""
    at_once = max(1, 8 * SEQ_LEN // sequences.shape[1])
    losses = [model(x[:, :-1], x[:, 1:]) for x in sequences.split(at_once)]
    return torch.cat(losses).double()


def benchmark(modes: list[str], options: ToyOptions) -> dict[str, Any]:
    """Train all `modes` with every seed, print their table, return it."""
    seeds = range(options.seeds)
    runs = [Run(mode, seed, options.steps, options.lr) for seed in seeds for mode in modes]
    outcomes: list[Outcome] = []

    def rows() -> Iterator[list[str]]:
        for outcome in in_processes(train_and_score, runs, options.processes):
            outcomes.append(outcome)
            yield _row(outcome)

    header = ("mode", "seed", "val nll", "prototype", "position 0 / 3 / 15")
    print_table((*header, "last 256", "of 1024", "prototype", "seconds"), rows())
    print(f"nll in nats per byte; {outcomes[0].parameters} parameters (of {modes[0]})")
    return {"outcomes": [asdict(outcome) for outcome in outcomes]}


def _row(outcome: Outcome) -> list[str]:
    mode = MODES[outcome.run.mode]
    return [
        outcome.run.mode,
        str(outcome.run.seed),
        f"{outcome.nll:.3f}",
        _shown(mode.prototype),
        " / ".join(f"{outcome.by_position[i]:.2f}" for i in SHOWN_POSITIONS),
        f"{outcome.last:.3f}",
        f"{outcome.long_last:.3f}",
        _shown(mode.prototype_long),
        f"{outcome.seconds:.0f}",
    ]


def _shown(nll: float | None) -> str:
    return "-" if nll is None else f"{nll:.3f}"


if __name__ == "__main__":
    run_benchmark("toy_lm", ToyOptions, MODES, benchmark, __doc__ or "")
