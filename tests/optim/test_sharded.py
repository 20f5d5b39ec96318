"""Optimizers and the gradient norm on shards: what unsharded parameters give."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

from modular_lm.optim import local_squares, scale_gradients
from modular_lm.optim.adamw import AdamW
from modular_lm.optim.muon import Muon
from modular_lm.parallel import World, init_world
from modular_lm.train.trainer import Trainer
from tests.pool import Pool
from tests.train.test_trainer import Recorder, config, rows, trainer, weights

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")


class Toy(nn.Module):
    """Matrices of shapes that occur several times and once, evenly and unevenly to be split."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ModuleList(nn.Linear(12, 20, bias=False) for _ in range(3))
        self.down = nn.ModuleList(nn.Linear(20, 12, bias=False) for _ in range(3))
        self.odd = nn.Linear(7, 5, bias=False)
        self.norm = nn.RMSNorm(12)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))


def replicated(toy: Toy) -> None:
    """Plain tensors on every rank."""


def fsdp(toy: Toy) -> None:
    fully_shard(toy, mesh=init_device_mesh("cpu", (4,)))


def hsdp(toy: Toy) -> None:
    fully_shard(toy, mesh=init_device_mesh("cpu", (2, 2), mesh_dim_names=("r", "s")))


def tensor_parallel(toy: Toy) -> None:
    """Matrices split in both ways, `odd` and the norm plain: as many meshes as there can be."""
    _split(toy, init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))["tp"])


def tensor_parallel_and_fsdp(toy: Toy) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    _split(toy, mesh["tp"])
    fully_shard(toy, mesh=mesh["dp"])


def _split(toy: Toy, mesh: Any) -> None:
    ways = {f"up.{i}": ColwiseParallel() for i in range(3)}
    parallelize_module(toy, mesh, {**ways, **{f"down.{i}": RowwiseParallel() for i in range(3)}})


MESHES: dict[str, Callable[[Toy], None]] = {
    "replicated": replicated,
    "fsdp": fsdp,
    "hsdp": hsdp,
    "tensor_parallel": tensor_parallel,
    "tensor_parallel_and_fsdp": tensor_parallel_and_fsdp,
}


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def arrays(tensors: dict[str, Tensor]) -> dict[str, np.ndarray]:
    """What a rank can send."""
    return {name: tensor.numpy() for name, tensor in tensors.items()}


def like(full: Tensor, parameter: Tensor) -> Tensor:
    """`full` laid out as a parameter is."""
    if not isinstance(parameter, DTensor):
        return full.clone()
    mesh, placements = parameter.device_mesh, parameter.placements
    return distribute_tensor(full.clone(), mesh, placements, src_data_rank=None)


def update(toy: Toy, optimizers: tuple[Muon, AdamW], step: int, found_inf: float) -> float:
    """A clipped step along gradients that depend on `step` alone; their norm."""
    parameters, generator = list(toy.parameters()), torch.Generator().manual_seed(step)
    for parameter in parameters:
        full = torch.randn(parameter.shape, generator=generator)
        parameter.grad = like(full, parameter)  # type: ignore[assignment]
    squares = local_squares(parameters, CPU)
    if dist.is_initialized():
        dist.all_reduce(squares)
    # In fp64 sums of another order round the same norm to fp32.
    norm = squares.sqrt().float()
    scale_gradients(parameters, norm, 1.0)
    for optimizer in optimizers:
        optimizer.found_inf = torch.tensor(found_inf)
        optimizer.step()
    return norm.item()


def optimizers_of(toy: Toy) -> tuple[Muon, AdamW]:
    matrices = [p for p in toy.parameters() if p.ndim == 2]
    rest = [p for p in toy.parameters() if p.ndim == 1]
    return Muon([{"params": matrices, "lr": 0.02}]), AdamW([{"params": rest, "lr": 0.1}])


def history(name: str | None) -> list[tuple[float, dict[str, np.ndarray]]]:
    """Norm and whole weights after each of four steps, of which the third is skipped."""
    toy, found = Toy(), []
    if name is not None:
        MESHES[name](toy)
    optimizers = optimizers_of(toy)
    for step in range(4):
        norm = update(toy, optimizers, step, float(step == 2))
        full = {n: whole(p).detach().clone() for n, p in toy.named_parameters()}
        found.append((norm, arrays(full)))
    return found


@pytest.mark.parametrize("name", MESHES)
def test_shards_are_updated_as_the_whole(pool: Pool, name: str) -> None:
    expected = history(None)
    for of_rank in pool.run(4, history, name):
        for (norm, found), (norm_alone, alone) in zip(of_rank, expected, strict=True):
            assert norm == pytest.approx(norm_alone, rel=1e-6)
            for parameter, array in alone.items():
                np.testing.assert_allclose(found[parameter], array, rtol=1e-6, atol=1e-7)
        (_, before), (_, skipped) = of_rank[1:3]
        assert all(np.array_equal(before[n], skipped[n]) for n in before)


def unreduced() -> tuple[float, bool]:
    """Norm of a gradient that each rank has a summand of; whether it is whole afterwards."""
    mesh = init_device_mesh("cpu", (2,))
    parameter = nn.Parameter(distribute_tensor(torch.zeros(4), mesh, [Replicate()]))
    mine = torch.full((4,), float(dist.get_rank() + 1))
    parameter.grad = DTensor.from_local(mine, mesh, [Partial()])  # type: ignore[assignment]
    squares = local_squares([parameter], CPU)
    dist.all_reduce(squares)
    assert isinstance(parameter.grad, DTensor)
    return squares.item(), torch.equal(parameter.grad.to_local(), torch.full((4,), 3.0))


def test_a_gradient_still_to_be_summed_is(pool: Pool) -> None:
    assert pool.run(2, unreduced) == [(36.0, True)] * 2


# ------------------------------------------------------------------ in training


def rank_rows(world: World, start: int = 0, stop: int = 12) -> Any:
    """Each rank's share of the rows of `tests.train.test_trainer`."""
    for step in rows(start, stop):
        ends = (world.data_rank, world.data_rank + 1)
        mine = slice(*(len(step.index) * end // world.data_size for end in ends))
        yield type(step)(step.step, step.index[mine], step.tokens[mine])


def muon_run(
    folder: Path, start: int, stop: int, *mesh: str
) -> tuple[list[tuple[float, float]], dict[str, np.ndarray]]:
    """(loss, norm) of steps on these ranks, and the whole weights after them."""
    keys = ("optim.name=muon", "checkpoint.dump.every=0", *mesh)
    world, recorder = init_world(config(*keys).distributed, use_gpu=False), Recorder()
    t: Trainer = trainer(world, folder, recorder, *keys)
    t.resume(start)
    t.run(rank_rows(world, start), stop)
    lines = [(line["loss/out"], line["optim/grad_norm"]) for line in recorder.lines]
    return lines, arrays(weights(t.model))


@pytest.mark.parametrize("mesh", ["dp_shard=4", "tp_size=2", "dp_replicate=2"])
def test_muon_trains_on_several_ranks_as_on_one_and_goes_on_with_more(
    pool: Pool, tmp_path: Path, mesh: str
) -> None:
    ((alone, weights_alone),) = pool.run(1, muon_run, tmp_path / "alone", 0, 6)
    first = pool.run(2, muon_run, tmp_path / "shared", 0, 3)
    rest = pool.run(4, muon_run, tmp_path / "shared", 3, 6, f"distributed.{mesh}")
    lines = first[0][0] + rest[0][0]
    assert [loss for loss, _ in lines] == pytest.approx([loss for loss, _ in alone], rel=1e-4)
    assert [norm for _, norm in lines] == pytest.approx([norm for _, norm in alone], rel=1e-2)
    for _, found in rest:
        # Orthogonalised in bf16: a gradient's last bits may move an update's by some hundredths.
        for name, array in weights_alone.items():
            np.testing.assert_allclose(found[name], array, rtol=0, atol=5e-3, err_msg=name)
