"""Checkpoints that come from another kind of machine, or that one rank alone cannot read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from modular_lm.errors import AgreedError
from modular_lm.parallel import init_world
from modular_lm.train import checkpoint, saving
from modular_lm.train.initial import load_initial
from modular_lm.train.random_state import get_random_state
from tests.pool import Pool
from tests.train.test_trainer import Recorder, rows, trainer

CHECKPOINT = "checkpoints/0000000004"


def resumed_from_a_gpu(folder: Path) -> tuple[bool, bool]:
    """Whether random numbers go on, and weights are there, as a GPU's rank has saved them."""
    world = init_world(use_gpu=False)

    def with_a_gpus(device: torch.device) -> torch.Tensor:
        return torch.cat((get_random_state(device), torch.arange(16, dtype=torch.uint8)))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(saving, "get_random_state", with_a_gpus)
        saver = trainer(world, folder, Recorder())
        saver.run(rows(), 4)
    expected = torch.rand(3)
    found = trainer(world, folder, Recorder())
    found.resume(4)
    pairs = zip(saver.model.parameters(), found.model.parameters(), strict=True)
    return torch.equal(torch.rand(3), expected), all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.slow
def test_a_cpu_goes_on_from_what_a_gpu_has_saved(pool: Pool, tmp_path: Path) -> None:
    assert pool.run(1, resumed_from_a_gpu, tmp_path) == [(True, True)]


def saved(folder: Path) -> None:
    trainer(init_world(use_gpu=False), folder, Recorder()).run(rows(), 4)


def unreadable_to_one(folder: Path, what: str) -> list[str]:
    """What the ranks say where one of them fails to open a file, and that they can go on."""
    world = init_world(use_gpu=False)
    fresh = trainer(world, folder, Recorder())
    path = str(folder / CHECKPOINT)
    loads = {
        "read_state": lambda: fresh.resume(4),
        "read_index": lambda: fresh.resume(4),
        "stored_shapes": lambda: load_initial(
            path, fresh.model, fresh.config.data.tokenizer, world
        ),
    }

    def fail(*_: Any) -> None:
        raise OSError(5, "Input/output error", f"{what} of rank 1")

    with pytest.MonkeyPatch.context() as patch:
        if world.rank == 1:
            patch.setattr(checkpoint, what, fail)
        with pytest.raises(AgreedError) as caught:
            loads[what]()
    loads[what]()
    return [str(caught.value)]


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("what", ["read_state", "read_index", "stored_shapes"])
def test_a_rank_that_cannot_read_ends_the_load_on_all(
    pool: Pool, tmp_path: Path, what: str
) -> None:
    pool.run(1, saved, tmp_path)
    first, second = pool.run(2, unreadable_to_one, tmp_path, what)
    assert first == second
    assert first[0].endswith(f"cannot be used: rank 1: {what} of rank 1: Input/output error")
