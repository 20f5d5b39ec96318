"""What the matrix of `test_matrix` is made of: meshes, models, and what the ranks of a mesh do.

A kind of model is saved by one mesh and loaded by another. `PAIRWISE` has for every two meshes one
kind, chosen so that any two properties (of mesh that saves, mesh that loads, and model) meet.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from modular_lm.config import TrainConfig, load_config
from modular_lm.config.checks import resolve
from modular_lm.data.dataset import StepRows, rank_range
from modular_lm.parallel import World, init_world
from modular_lm.tracking.run_folder import RunFolder
from modular_lm.train.checkpoint import read_state
from modular_lm.train.inventory import step_folder
from modular_lm.train.trainer import Callbacks, Trainer
from tests.train.ranks_worker import TOKENIZER, digest, state_digests

T, G = 16, 5
SAVED_AT, END = 2, 4
BASE = (
    f"steps=8 seed=3 data.seq_len={T} data.batch_size=2 optim.lr=1e-2 optim.warmup=1 model.dim=16 "
    "model.n_layers=2 model.n_heads=4 model.multiple_of=16 model.module_seq_len=4 "
    f"logging.freq=1 checkpoint.dump.every={SAVED_AT} checkpoint.dump.keep=-1"
)


@dataclasses.dataclass(frozen=True)
class Mesh:
    """So many ranks, and the keys that spread a model over them."""

    name: str
    ranks: int
    keys: str = ""

    def __str__(self) -> str:
        return self.name


MESHES = (
    Mesh("one", 1),
    Mesh("full_shard-2", 2),
    Mesh("shard_grad_op-2", 2, "distributed.fsdp_type=shard_grad_op"),
    Mesh("no_shard-2", 2, "distributed.fsdp_type=no_shard"),
    Mesh("tp-2", 2, "distributed.tp_size=2"),
    Mesh("full_shard-4", 4),
    Mesh("hsdp-2x2", 4, "distributed.dp_replicate=2"),
    Mesh("fsdp-2_tp-2", 4, "distributed.tp_size=2"),
    Mesh("tp-4", 4, "distributed.tp_size=4"),
)


@dataclasses.dataclass(frozen=True)
class Kind:
    """What is trained, beside where."""

    dtype: str
    agg: str
    column: bool
    optimizer: str

    @property
    def keys(self) -> str:
        """The keys of the config."""
        column = "model.module_names=code model.module_route=code model.module_train=all"
        return (
            f"distributed.model_dtype={self.dtype} model.module_agg={self.agg} "
            f"{'model.module_agg_dim=8' if self.agg == 'stack' else ''} "
            f"{column if self.column else ''} optim.name={self.optimizer}"
        )

    def __str__(self) -> str:
        return f"{self.dtype}-{self.agg}-{'column-' if self.column else ''}{self.optimizer}"


DTYPES, OPTIMIZERS = ("fp32", "bf16"), ("adamw", "muon")
AGGREGATIONS = ("drop", "avg", "sum", "stack")
KINDS = tuple(
    Kind(*values) for values in itertools.product(DTYPES, AGGREGATIONS, (False, True), OPTIMIZERS)
)


def _kind(saver: int, loader: int) -> Kind:
    """One kind for two meshes, by their numbers: every bit of it turns with each of them."""
    agg = (2 * saver // 3 + loader) % 4
    return Kind(
        DTYPES[(agg ^ saver) & 1],
        AGGREGATIONS[agg],
        bool(((agg >> 1) ^ (saver >> 1)) & 1),
        OPTIMIZERS[((agg ^ (agg >> 1)) ^ (saver >> 2)) & 1],
    )


PAIRWISE = tuple(
    (saver, loader, _kind(i, j))
    for (i, saver), (j, loader) in itertools.product(enumerate(MESHES), repeat=2)
)


@dataclasses.dataclass
class Seen:
    """What a rank saw. lines: of every step it did; middle, end: digests of all that is held at
    the step of the checkpoint and at the last; random: of its random numbers at the first."""

    lines: list[dict[str, Any]]
    middle: dict[str, str]
    end: dict[str, str]
    random: str
    state: dict[str, Any]


def save(folder: Path, mesh: Mesh, kind: Kind) -> Seen:
    """Train `END` steps, with a checkpoint after `SAVED_AT`, which training does not wait for."""
    trainer, lines, world = _trainer(folder, mesh, kind)
    torch.manual_seed(100 + world.rank)
    steps = _rows(world, 0)
    trainer.run(steps, SAVED_AT)
    middle, random = state_digests(trainer), digest(torch.get_rng_state())
    trainer.run(steps, END)
    state = read_state(step_folder(trainer.checkpoints, SAVED_AT))
    return Seen(lines, middle, state_digests(trainer), random, dataclasses.asdict(state))


def load(folder: Path, mesh: Mesh, kind: Kind) -> Seen:
    """Go on from that checkpoint to `END`."""
    trainer, lines, world = _trainer(folder, mesh, kind, "checkpoint.dump.every=0")
    torch.manual_seed(7)
    trainer.resume(SAVED_AT)
    middle, random = state_digests(trainer), digest(torch.get_rng_state())
    held = {"step": trainer.step, "tokens": trainer.tokens}
    trainer.run(_rows(world, SAVED_AT), END)
    return Seen(lines, middle, state_digests(trainer), random, held)


def _trainer(
    folder: Path, mesh: Mesh, kind: Kind, *more: str
) -> tuple[Trainer, list[dict[str, Any]], World]:
    keys = [*BASE.split(), *mesh.keys.split(), *kind.keys.split(), *more]
    config = resolve(load_config(TrainConfig, keys)[0], TOKENIZER.n_words)
    world = init_world(config.distributed, use_gpu=False)
    lines: list[dict[str, Any]] = []
    callbacks = Callbacks(
        metrics=lines.append,
        evaluation=lambda _: None,
        saved=lambda _: None,
        stop=lambda: None,
        stepped=lambda _: None,
        trouble=lambda *_: None,
    )
    return Trainer(config, world, RunFolder(folder), TOKENIZER, G, callbacks), lines, world


def _rows(world: World, start: int) -> Iterator[StepRows]:
    """This rank's rows of every step; all data-parallel ranks together hold the same ones."""
    for step in range(start, END):
        tokens = np.random.default_rng(step).integers(0, 64, (G, T + 1), dtype=np.uint16)
        first, last = rank_range(step, G, world.data_rank, world.data_size)
        yield StepRows(step, np.arange(first, last), tokens[first - step * G : last - step * G])
