"""Whole runs of the trainer on tensor-parallel meshes: rows, validation, digests, checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from modular_lm.parallel import init_world
from tests.eval.held_out import random_documents, write_held_out
from tests.pool import Pool
from tests.train import ranks_worker as worker

pytestmark = pytest.mark.slow

TP = "distributed.tp_size=2"
RUNS = {
    "TP x FSDP": (4, (TP,)),
    "TP x no_shard": (4, (TP, "distributed.fsdp_type=no_shard")),
    "TP": (2, (TP,)),
    "HSDP": (4, ("distributed.dp_shard=2",)),
    "shard_grad_op": (4, ("distributed.fsdp_type=shard_grad_op",)),
    "recomputed": (2, ("distributed.activation_checkpointing=selective",)),
    "muon": (4, (TP, "optim.name=muon")),
}


def run(folder: Path, name: str, keys: tuple[str, ...], begin: str | None = None) -> Any:
    """The lines of a run of a few steps, its state before and after them. On every rank.

    begin: the name of the run that it goes on with, from its first checkpoint
    """
    config = worker.tiny(*keys)
    world = init_world(config.distributed, use_gpu=False)
    lines, start = worker.Lines(), 0
    # Validation between steps meets weights that forward passes have left gathered.
    keys = (*keys, "checkpoint.eval.every=1")
    trainer = worker.make_trainer(world, folder, "ragged", lines, *keys, into=begin or name)
    if begin is not None:
        start = worker.RESUMED_AT
        trainer.resume(start)
    loaded = worker.state_digests(trainer)
    trainer.run(worker.rows(world, trainer.global_batch_size, start), worker.STEPS)
    return {**lines.told, "loaded": loaded, "state": worker.state_digests(trainer)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    documents = random_documents(worker.LENGTHS, 64)
    write_held_out(folder / "held_out", documents, worker.TOKENIZER)
    return folder


def column(lines: list[dict[str, float]], name: str) -> list[float]:
    return [line[name] for line in lines]


@pytest.mark.parametrize("name", RUNS)
def test_a_run_is_that_of_one_process(pool: Pool, folder: Path, name: str) -> None:
    size, keys = RUNS[name]
    of = tuple(key for key in keys if not key.startswith("distributed."))
    (alone,) = pool.run(1, run, folder, f"{name} alone", of)
    # Muon works in bf16, where another order of sums shows.
    exact = 2e-2 if name == "muon" else 1e-4
    for rank in pool.run(size, run, folder, name, keys):
        assert rank["loaded"] == alone["loaded"], "initial weights"
        for line in ("loss/out", "loss/bpb", "optim/grad_norm"):
            found, expected = column(rank["metrics"], line), column(alone["metrics"], line)
            assert found == pytest.approx(expected, rel=exact), line
        for line in ("optim/total_tokens", "data/digest"):
            assert column(rank["metrics"], line) == column(alone["metrics"], line)
        lines = zip(rank["evaluation"], alone["evaluation"], strict=True)
        assert all(found == pytest.approx(expected, rel=exact) for found, expected in lines)


def test_a_run_goes_on_on_other_meshes(pool: Pool, folder: Path) -> None:
    saved = pool.run(4, run, folder, "saved", (TP,))[0]
    again = pool.run(4, run, folder, "again", (TP,), "saved")[0]
    assert again["state"] == saved["state"], "on the same mesh to the bit"
    rest = column(saved["metrics"], "loss/out")[worker.RESUMED_AT :]
    for size, keys in ((4, ("distributed.dp_shard=2",)), (2, (TP,)), (1, ())):
        for rank in pool.run(size, run, folder, f"{keys} on {size}", keys, "saved"):
            assert rank["loaded"] == again["loaded"]
            assert column(rank["metrics"], "loss/out") == pytest.approx(rest, rel=1e-4)
