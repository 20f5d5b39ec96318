"""What spreading a model over processes does to its loss and gradients.

    python -m benchmarks.numerics [group ...]

One optimizer step of the real trainer on a small model, for every combination of `COMBINATIONS`,
against the same step of one process; on CPUs, over gloo. Both must differ by rounding only:

- loss: |a - b| / |b|
- gradients: max |a - b| / max |b| over the elements of a parameter, of the worst parameter

Prints the table of docs/training.md, writes benchmarks/results/numerics.json. The limits that hold
are in tests/parallel.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch.distributed.tensor import DTensor

from benchmarks._runs import print_table, run_benchmark
from modular_lm.config import TrainConfig, load_config
from modular_lm.config.checks import resolve
from modular_lm.config.schema import TokenizerConfig
from modular_lm.data.dataset import StepRows, rank_range
from modular_lm.model.init import draw, fill
from modular_lm.model.layers import Initial
from modular_lm.parallel import init_world
from modular_lm.tokenizer import build_tokenizer
from modular_lm.tracking.run_folder import RunFolder
from modular_lm.train.trainer import Callbacks, Trainer
from tests.pool import Pool

Gradients = dict[str, npt.NDArray[np.float64]]
Result = tuple[float, float, Gradients | None]

T, ROWS = 64, 6
MODEL = (
    "seed=3 optim.clip=1e9 model.dim=32 model.n_layers=3 model.n_heads=4 model.multiple_of=32 "
    f"data.seq_len={T} data.batch_size={ROWS} model.module_seq_len=16 model.module_agg=stack "
    "model.module_n_summary=2 model.module_agg_dim=16 distributed.model_dtype=fp32"
)


@dataclass(frozen=True)
class Combination:
    """A way to compute a step: `keys` say how, `of` what, which is what one process does, too."""

    group: str
    name: str
    ranks: int
    keys: str = ""
    of: str = ""


def _spread(group: str, name: str, of: str) -> list[Combination]:
    """A model over the meshes that matter for it."""
    return [
        Combination(group, f"{name}, {mesh}", 4, keys, of)
        for mesh, keys in (("FSDP 4", FSDP), ("TP 2 x FSDP 2", TP_FSDP))
    ]


D = "distributed."
FSDP, TP_FSDP = "", f"{D}tp_size=2"
DENSE = "model.module_agg=drop model.module_seq_len=null model.n_kv_heads=2"
NO_SHARD, GRAD_OP = f"{D}fsdp_type=no_shard", f"{D}fsdp_type=shard_grad_op"
BF16, FLOAT8 = f"{D}model_dtype=bf16", f"{D}float8_recipe="
AC, ONE_ROW = f"{D}activation_checkpointing=", "data.batch_size=1"
COMBINATIONS = [
    Combination("mesh", "no_shard 4 (DDP)", 4, NO_SHARD),
    Combination("mesh", "full_shard 4", 4, FSDP),
    Combination("mesh", "shard_grad_op 4", 4, GRAD_OP),
    Combination("mesh", "HSDP 2 x 2", 4, f"{D}dp_shard=2"),
    Combination(
        "mesh", "HSDP 2 x 2, shard_grad_op", 4, f"{D}dp_shard=2 {D}fsdp_type=shard_grad_op"
    ),
    Combination("mesh", "TP 2", 2, f"{D}tp_size=2"),
    Combination("mesh", "TP 4", 4, f"{D}tp_size=4"),
    Combination("mesh", "TP 2 x FSDP 2", 4, TP_FSDP),
    Combination("mesh", "TP 2 x no_shard 2", 4, f"{TP_FSDP} {NO_SHARD}"),
    Combination("accumulation", "1 process", 1, ONE_ROW),
    Combination("accumulation", "no_shard 4, ragged", 4, f"{ONE_ROW} {NO_SHARD}"),
    Combination("accumulation", "full_shard 4, ragged", 4, ONE_ROW),
    Combination(
        "accumulation", "shard_grad_op 4, ragged", 4, f"{ONE_ROW} {D}fsdp_type=shard_grad_op"
    ),
    Combination("accumulation", "HSDP 2 x 2, ragged", 4, f"{ONE_ROW} {D}dp_shard=2"),
    Combination("accumulation", "TP 2 x FSDP 2", 4, f"{ONE_ROW} {TP_FSDP}"),
    Combination("recompute", "full, 1 process", 1, AC + "full"),
    Combination("recompute", "selective, 1 process", 1, AC + "selective"),
    Combination("recompute", "full, FSDP 4", 4, AC + "full"),
    Combination("recompute", "full, TP 2 x FSDP 2", 4, f"{TP_FSDP} {AC}full"),
    Combination("recompute", "selective, TP 2 x FSDP 2", 4, f"{TP_FSDP} {AC}selective"),
    *_spread("model", "avg, tied head", "model.module_agg=avg model.weight_tying=true"),
    *_spread("model", "look-back, documents", "model.module_lookback=8 data.document_mask=true"),
    *_spread(
        "model",
        "a column",
        "model.module_names=code model.module_route=code model.module_train=all",
    ),
    *_spread("model", "dense, GQA", DENSE),
    Combination("dtype", "bf16 for fp32, 1 process", 1, BF16),
    *_spread("dtype", "bf16", BF16),
    Combination("float8", "tensorwise for fp32, 1 process", 1, FLOAT8 + "tensorwise"),
    *_spread("float8", "tensorwise", FLOAT8 + "tensorwise"),
    Combination("float8", "rowwise for fp32, 1 process", 1, FLOAT8 + "rowwise"),
    *_spread("float8", "rowwise", FLOAT8 + "rowwise"),
    Combination("compile", "1 process", 1, f"{D}compile=true"),
    Combination("compile", "TP 2 x FSDP 2", 4, f"{TP_FSDP} {D}compile=true"),
    Combination("compile", "selective recomputation, FSDP 4", 4, f"{D}compile=true {AC}selective"),
]


@dataclass(frozen=True)
class Difference:
    """Of a combination to one process; parameter: the one whose gradient differs most."""

    combination: Combination
    loss: float
    gradients: float
    norm: float
    parameter: str


def step(keys: str) -> Result:
    """Loss, global norm and, on rank 0, whole gradients of one step. On every rank of a group."""
    tokenizer = build_tokenizer(TokenizerConfig())
    config = resolve(load_config(TrainConfig, [*MODEL.split(), *keys.split()])[0], 258)
    world = init_world(config.distributed, use_gpu=False)
    quiet = Callbacks(*[_nothing for _ in dataclasses.fields(Callbacks)])
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(config, world, RunFolder(Path(folder)), tokenizer, ROWS, quiet)
    _wake_sites(trainer)
    found: Gradients = {}

    def record(*_: object) -> None:
        for name, parameter in trainer.model.named_parameters():
            if (grad := parameter.grad) is not None:
                whole = grad.full_tensor() if isinstance(grad, DTensor) else grad
                found[name] = whole.double().numpy()

    trainer.optimizers.parts[0].register_step_pre_hook(record)
    tokens = np.random.default_rng(1).integers(0, 258, (ROWS, T + 1), dtype=np.uint16)
    first, last = rank_range(0, ROWS, world.data_rank, world.data_size)
    result = trainer.stepper.step(StepRows(0, np.arange(first, last), tokens[first:last])).read()
    loss = result.nll / (ROWS * T)
    return loss, result.grad_norm, found if world.rank == 0 else None


def _nothing(*_: Any) -> Any:
    return None


def _wake_sites(trainer: Trainer) -> None:
    """Sites start with an output of zero, which would hide their other gradients."""
    for name, parameter in trainer.model.named_parameters():
        if name.startswith("aggs.") and name.endswith(".wo.weight"):
            fill(parameter, draw(Initial(std=0.2), parameter.shape, 3, name))


def compare(
    combination: Combination,
    alone: Result,
    ranks: Sequence[Result],
) -> Difference:
    """The results of `step`, of one process and of all ranks of a combination."""
    loss, norm, expected = alone
    found = ranks[0][2]
    assert expected is not None
    assert found is not None
    assert found.keys() == expected.keys()
    of = {name: _relative(found[name], expected[name]) for name in expected}
    worst = max(of, key=of.__getitem__)
    return Difference(
        combination,
        max(abs(rank[0] - loss) / loss for rank in ranks),
        of[worst],
        max(abs(rank[1] - norm) / norm for rank in ranks),
        worst,
    )


@dataclass
class Options:
    """None: what is compared is fixed."""


def measure(pool: Pool, combinations: Iterable[Combination]) -> Iterator[Difference]:
    """Every combination in turn, each `of` of one process once."""
    alone: dict[str, Result] = {}
    for c in combinations:
        if c.of not in alone:
            (alone[c.of],) = pool.run(1, step, c.of)
        yield compare(c, alone[c.of], pool.run(c.ranks, step, f"{c.of} {c.keys}"))


def benchmark(groups: list[str], _: Options) -> dict[str, Any]:
    found: list[Difference] = []

    def rows(pool: Pool) -> Iterator[Sequence[str]]:
        chosen = [c for c in COMBINATIONS if c.group in groups]
        for each in measure(pool, chosen):
            found.append(each)
            c = each.combination
            figures = (f"{x:.1e}" for x in (each.loss, each.gradients, each.norm))
            yield [f"{c.group}: {c.name}", str(c.ranks), *figures]

    with tempfile.TemporaryDirectory(prefix="mlm", dir="/tmp") as short, Pool(Path(short)) as pool:
        print_table(["combination", "ranks", "loss", "gradients", "norm"], rows(pool))
    return {"differences": [dataclasses.asdict(each) for each in found]}


def _relative(a: npt.NDArray[np.float64], b: npt.NDArray[np.float64]) -> float:
    return float(np.abs(a - b).max() / np.abs(b).max())


if __name__ == "__main__":
    groups = dict.fromkeys(c.group for c in COMBINATIONS)
    run_benchmark("numerics", Options, groups, benchmark, __doc__ or "")
