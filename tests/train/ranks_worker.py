"""One rank of `test_ranks`: `python -m tests.train.ranks_worker FOLDER`, as torchrun starts it.

Runs every check of `CHECKS` on the real trainer, in one process group; rank 0 writes what all
ranks saw to FOLDER/results.json: {check: [result of rank 0, of rank 1, ...]}. The test runs the
same functions in a world of one and compares.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict
from torch.distributed.tensor import DTensor

from modular_lm.cli import leave
from modular_lm.config import TrainConfig, load_config
from modular_lm.config.checks import resolve
from modular_lm.config.schema import TokenizerConfig
from modular_lm.data.dataset import StepRows, rank_range
from modular_lm.errors import AgreedError, DataError
from modular_lm.eval.perplexity import Validation
from modular_lm.model.lm import LanguageModel
from modular_lm.parallel import World, build_model, init_world
from modular_lm.tokenizer import build_tokenizer
from modular_lm.tracking.run_folder import RunFolder
from modular_lm.train.inventory import complete_steps, step_folder
from modular_lm.train.trainer import Callbacks, Trainer

SIZE = 3  # divides none of the model's widths, so that shards are uneven
T = 32
TOKENIZER = build_tokenizer(TokenizerConfig())
BASE = (
    f"steps=8 seed=3 data.seq_len={T} optim.lr=1e-2 optim.warmup=1 model.dim=16 model.n_layers=2 "
    "model.n_heads=2 model.multiple_of=16 model.module_seq_len=8 model.module_agg=stack "
    "model.module_agg_dim=8 distributed.model_dtype=fp32 logging.freq=1 checkpoint.dump.every=0"
)
STEPS, RESUMED_AT = 4, 2
# Name of a run -> its global batch, and what is special about it.
RUNS: dict[str, tuple[int, tuple[str, ...]]] = {
    # Shares of 2, 2 and 3 rows in two micro-steps.
    "ragged": (7, ("data.batch_size=2", f"checkpoint.dump.every={RESUMED_AT}")),
    # Shares of 1, 1 and 2 rows: in the second micro-step two ranks have none.
    "idle": (4, ("data.batch_size=1",)),
    "avg": (7, ("data.batch_size=2", "model.module_agg=avg")),
    "one_chunk": (4, ("data.batch_size=1", "model.module_seq_len=null")),
    "bf16": (7, ("data.batch_size=2", "distributed.model_dtype=bf16")),
}
# Held-out documents. In batches of three the first is four chunks wide though two of its ranks
# hold less than one chunk; the second is narrower than a chunk, and two ranks have no document.
LENGTHS = (50, 3, 7, 6)


def tiny(*args: str) -> TrainConfig:
    return resolve(load_config(TrainConfig, [*BASE.split(), *args])[0], TOKENIZER.n_words)


def rows(world: World, batch: int, start: int = 0) -> Iterator[StepRows]:
    """This rank's rows of every step from `start` on; all ranks together hold the same ones."""
    for step in range(start, STEPS):
        tokens = np.random.default_rng(step).integers(0, 64, (batch, T + 1), dtype=np.uint16)
        first, last = rank_range(step, batch, world.data_rank, world.data_size)
        yield StepRows(
            step, np.arange(first, last), tokens[first - step * batch : last - step * batch]
        )


class Lines:
    """What the callbacks of one rank were told, as JSON."""

    def __init__(self, stop_at_line: int | None = None) -> None:
        self.told: dict[str, list[dict[str, Any]]] = {"metrics": [], "evaluation": [], "saved": []}
        self._stop_at_line = stop_at_line

    def callbacks(self) -> Callbacks:
        return Callbacks(
            self.told["metrics"].append,
            self.told["evaluation"].append,
            self.told["saved"].append,
            self._stop,
            lambda _: None,
            lambda *_: None,
        )

    def _stop(self) -> str | None:
        return "asked" if len(self.told["metrics"]) == self._stop_at_line else None


def make_trainer(
    world: World, folder: Path, name: str, lines: Lines, *args: str, into: str | None = None
) -> Trainer:
    """into: the run's folder below `folder`."""
    batch, special = RUNS[name]
    held_out = {"held_out": folder / "held_out"}
    validation = Validation(held_out, TOKENIZER, T, max_docs=9, batch_size=1, chunk_len=8)
    return Trainer(
        tiny(*special, *args),
        world,
        RunFolder(folder / (into or f"{name}_{world.size}")),
        TOKENIZER,
        batch,
        lines.callbacks(),
        validation,
    )


def train(world: World, folder: Path, name: str) -> dict[str, Any]:
    """A run of `STEPS` steps: its lines, and digests of all that its last checkpoint holds."""
    lines = Lines()
    trainer = make_trainer(world, folder, name, lines)
    types = set()
    trainer.model.layers[1].get_submodule("attention").register_forward_pre_hook(
        lambda _, args: types.add((str(args[0].dtype), str(args[1].rope.cos.dtype)))
    )
    trainer.run(rows(world, trainer.global_batch_size), STEPS)
    return {**lines.told, "state": state_digests(trainer), "types": sorted(types)}


def resume(world: World, folder: Path, saved_by: int) -> dict[str, Any]:
    """The rest of the run `ragged` from the checkpoint that `saved_by` ranks wrote."""
    lines, into = Lines(), f"resumed_from_{saved_by}_by_{world.size}"
    if world.rank == 0:
        saved, copied = (
            step_folder(folder / run / "checkpoints", RESUMED_AT)
            for run in (f"ragged_{saved_by}", into)
        )
        shutil.copytree(saved, copied)
    dist.barrier()
    trainer = make_trainer(world, folder, "ragged", lines, into=into)
    trainer.resume(RESUMED_AT)
    loaded = state_digests(trainer)
    trainer.run(rows(world, trainer.global_batch_size, RESUMED_AT), STEPS)
    return {**lines.told, "loaded": loaded}


def column(world: World, folder: Path) -> dict[str, Any]:
    """A column added to what one process trained in `ragged`, and trained; then mixed routes."""
    lines, source = Lines(), step_folder(folder / "ragged_1" / "checkpoints", STEPS)
    keys = ("model.create_module_name=code", f"checkpoint.init_ckpt_path={source}")
    trainer = Trainer(
        tiny("data.batch_size=2", *keys),
        world,
        RunFolder(folder / f"column_{world.size}"),
        TOKENIZER,
        RUNS["ragged"][0],
        lines.callbacks(),
    )
    trainer.resume(0)
    begun = state_digests(trainer)
    trainer.run(rows(world, trainer.global_batch_size), STEPS)
    mixed = mixed_routes(world, trainer.model)
    return {**lines.told, "begun": begun, "state": state_digests(trainer), "mixed": mixed}


def mixed_routes(world: World, model: LanguageModel) -> list[float]:
    """Loss, and norm of the gradient, of one row of the base, one of the column, one of both.

    On three ranks each has one row, so that columns are without a chunk on some.
    """
    routes = torch.tensor([[0, 0, 0, 0], [1, 1, 1, 1], [0, 1, 1, 0]])[world.rank :: world.size]
    tokens = torch.randint(64, (3, T + 1), generator=torch.Generator().manual_seed(0))
    mine = tokens[world.rank :: world.size]
    loss = model(mine[:, :-1], mine[:, 1:], routes=routes).sum()
    (loss * world.size).backward()  # the mean over ranks undone
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1e9)
    model.zero_grad()
    whole = norm.full_tensor() if isinstance(norm, DTensor) else norm
    return [*world.sum(loss.item()), whole.item()]


def state_digests(trainer: Trainer) -> dict[str, str]:
    """SHA-256 of every whole tensor of model and optimizer. A collective."""
    options = StateDictOptions(full_state_dict=True)
    model, optimizer = get_state_dict(trainer.model, trainer.optimizers.parts, options=options)
    moments = cast("dict[str, dict[str, Tensor]]", optimizer["state"])
    found = {name: digest(cast("Tensor", tensor)) for name, tensor in model.items()}
    for name, of_parameter in moments.items():
        found |= {f"{name}/{moment}": digest(tensor) for moment, tensor in of_parameter.items()}
    return found


def digest(tensor: Tensor) -> str:
    whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return hashlib.sha256(whole.detach().float().numpy().tobytes()).hexdigest()


def initial(world: World, folder: Path) -> dict[str, str]:
    """Digests of the whole initial weights of a sharded model."""
    model = build_model(tiny(), world)
    shares = [p.to_local().numel() for p in model.parameters() if isinstance(p, DTensor)]
    total = sum(p.numel() for p in model.parameters())
    assert world.sum(sum(shares)) == [total], "the model is not sharded"
    return {name: digest(p) for name, p in model.named_parameters()}


def together(world: World, folder: Path) -> dict[str, Any]:
    """What ranks see when some of them fail in the same act, and when none does."""

    def outcome(failures: dict[int, Exception]) -> Any:
        def act() -> int:
            if world.rank in failures:
                raise failures[world.rank]
            return 10 * world.rank

        try:
            return world.together(act, "the act failed")
        except AgreedError as error:
            return [str(error), error.exit_code]

    return {
        "none": outcome({}),
        "input": outcome({1: DataError("x.parquet: truncated")}),
        "disk": outcome({2: OSError(errno.ENOSPC, "No space left on device", "shard")}),
        "two": outcome({1: ValueError("first\nof two"), 2: DataError("second")}),
    }


def full_disk(world: World, folder: Path) -> dict[str, Any]:
    """A save during which rank 1's disk is full, then one that works."""

    def refuse(*args: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "__1_0.distcp")

    lines = Lines()
    keys = ("checkpoint.dump.every=1",)
    trainer = make_trainer(world, folder, "ragged", lines, *keys, into="full_disk")
    steps = rows(world, trainer.global_batch_size)
    trainer.run(steps, 1)
    with pytest.MonkeyPatch.context() as patch:
        if world.rank == 1:
            patch.setattr(FileSystemWriter, "write_data", refuse)
        with pytest.raises(AgreedError) as caught:
            trainer.run(steps, 2)
    after_failure = complete_steps(trainer.folder.checkpoints)
    dist.barrier()  # nobody saves again before all have looked
    trainer.run(steps, 3)
    return {
        "message": str(caught.value),
        "exit_code": caught.value.exit_code,
        "complete": after_failure,
        "complete_later": complete_steps(trainer.folder.checkpoints),
        "folders": sorted(os.listdir(trainer.folder.checkpoints)),
    }


def stop(world: World, folder: Path) -> dict[str, Any]:
    """A run that only the last rank is asked to stop, after two steps."""
    lines = Lines(stop_at_line=2 if world.rank == world.size - 1 else None)
    trainer = make_trainer(world, folder, "idle", lines, into="stop")
    outcome = trainer.run(rows(world, trainer.global_batch_size), STEPS)
    return {"status": outcome.status, "step": outcome.step, "saved": lines.told["saved"]}


CHECKS: dict[str, Callable[[World, Path], Any]] = {
    "initial": initial,
    **{name: lambda world, folder, name=name: train(world, folder, name) for name in RUNS},
    "resumed": lambda world, folder: resume(world, folder, saved_by=1),
    "column": column,
    "together": together,
    "full_disk": full_disk,
    "stop": stop,
}


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    world = init_world(use_gpu=False)
    results = {name: world.gather(check(world, folder)) for name, check in CHECKS.items()}
    if world.rank == 0:
        (folder / "results.json").write_text(json.dumps(results))
    dist.destroy_process_group()
    leave(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
