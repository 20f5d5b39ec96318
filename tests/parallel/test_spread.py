"""What a spread model is made of: initial weights, the global norm, collectives, dtypes."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.numerics import MODEL, Combination, compare, step
from modular_lm.config import TrainConfig, load_config
from modular_lm.config.checks import resolve
from modular_lm.model.init import init_weights
from modular_lm.model.lm import LanguageModel
from modular_lm.optim import local_squares, scale_gradients
from modular_lm.parallel import begin_micro_step, build_model, init_world
from tests.pool import Pool

pytestmark = pytest.mark.slow

MESHES = {
    "full_shard": "",
    "no_shard": "distributed.fsdp_type=no_shard",
    "HSDP": "distributed.dp_shard=2",
    "TP": "distributed.tp_size=4",
    "TP x FSDP": "distributed.tp_size=2",
    "float8": "distributed.tp_size=2 distributed.float8_recipe=rowwise",
}
# No number of ranks divides the vocabulary or the width of the feed-forward's shards evenly.
UNEVEN = "model.vocab_size=259 model.ffn_dim_multiplier=0.4 model.multiple_of=4 model.dim=40"


def tiny(*args: str) -> TrainConfig:
    keys = [*MODEL.split(), *(key for arg in args for key in arg.split())]
    return resolve(load_config(TrainConfig, keys)[0], 258)


# ------------------------------------------------------------------ weights


def misplaced_weights(keys: str) -> list[str]:
    """The parameters whose whole initial value is not that of a plain model."""
    config = tiny(keys)
    plain = LanguageModel(config.model)
    init_weights(plain, config.seed)
    expected = dict(plain.named_parameters())
    model = build_model(config, init_world(config.distributed, use_gpu=False))
    assert set(dict(model.named_parameters())) == set(expected)
    wrong = []
    for name, parameter in model.named_parameters():
        whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
        if not torch.equal(whole, expected[name]):
            wrong.append(name)
    return wrong


@pytest.mark.parametrize("mesh", MESHES)
def test_initial_weights_are_those_of_a_plain_model(pool: Pool, mesh: str) -> None:
    shape = "" if mesh == "float8" else UNEVEN
    assert pool.run(4, misplaced_weights, f"{shape} {MESHES[mesh]}") == [[]] * 4


def held_by_rank(keys: str) -> tuple[int, int]:
    """Numbers that this rank holds, and that the model has."""
    config = tiny(keys)
    model = build_model(config, init_world(config.distributed, use_gpu=False))
    local = [p.to_local() if isinstance(p, DTensor) else p for p in model.parameters()]
    return sum(p.numel() for p in local), sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("mesh", "shares"),
    [("full_shard", 4), ("no_shard", 1), ("HSDP", 2), ("TP", 4), ("TP x FSDP", 4)],
)
def test_each_rank_holds_its_share(pool: Pool, mesh: str, shares: int) -> None:
    for held, total in pool.run(4, held_by_rank, MESHES[mesh]):
        # Shards are not quite even, norms are whole on each tensor-parallel peer.
        assert held == pytest.approx(total / shares, rel=0.1)


def test_a_world_of_one_in_fp32_has_plain_weights(pool: Pool) -> None:
    assert pool.run(1, is_plain) == [True]


def is_plain() -> bool:
    config = tiny()
    model = build_model(config, init_world(config.distributed, use_gpu=False))
    return not any(isinstance(p, DTensor) for p in model.parameters())


# ------------------------------------------------------------------ the head


def logits_off_by(keys: str) -> float:
    """Of a spread model to a plain one, as logits of one batch of all ranks."""
    config = tiny(keys)
    plain = LanguageModel(config.model)
    init_weights(plain, config.seed)
    model = build_model(config, init_world(config.distributed, use_gpu=False))
    tokens = torch.arange(128).view(2, 64) % 258
    with torch.no_grad():
        return (model(tokens) - plain(tokens)).abs().max().item()


@pytest.mark.parametrize("tied", ["", "model.weight_tying=true"], ids=["head", "tied"])
def test_logits_are_whole_on_every_peer_though_the_vocabulary_is_not_divisible(
    pool: Pool, tied: str
) -> None:
    keys = f"model.vocab_size=259 {tied} distributed.tp_size=4"
    assert max(pool.run(4, logits_off_by, keys)) < 1e-5


def sliced_step(keys: str) -> Any:
    """`step`, with the logits of no more than 16 tokens held at once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("modular_lm.model.lm.LOGITS_AT_ONCE", 16 * 258)
        return step(keys)


def test_a_loss_in_slices_is_the_same(pool: Pool) -> None:
    c = Combination("head", "slices", 4, "distributed.tp_size=2")
    found = compare(c, pool.run(1, step, "")[0], pool.run(4, sliced_step, c.keys))
    assert found.loss < 1e-6
    assert found.gradients < 1e-5


# ------------------------------------------------------------------ the global norm


def norms_on_mixed_meshes() -> tuple[float, float, float]:
    """The norm of gradients on three meshes: as one tensor, of the parts, and once scaled to 0.5.

    Fails where a scaled gradient is not the whole one, scaled.
    """
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    generator = torch.Generator().manual_seed(0)
    layouts = [
        (mesh, [Shard(0), Shard(1)]),
        (mesh, [Replicate(), Shard(0)]),
        (mesh["dp"], [Shard(0)]),
        (mesh["tp"], [Replicate()]),
    ]
    wholes = [torch.randn(5, 3, generator=generator) for _ in layouts]  # shards are uneven
    parameters = [nn.Parameter(torch.zeros(2))]  # without a gradient
    for whole, (where, placements) in zip(wholes, layouts, strict=True):
        parameter = nn.Parameter(distribute_tensor(torch.zeros(5, 3), where, placements))
        parameter.grad = distribute_tensor(whole.clone(), where, placements)
        parameters.append(parameter)

    def norm() -> Tensor:
        squares = local_squares(parameters, torch.device("cpu"))
        dist.all_reduce(squares)
        return squares.sqrt()

    expected, before = torch.stack(wholes).norm(), norm()
    scale_gradients(parameters, before, 0.5)
    for whole, parameter in zip(wholes, parameters[1:], strict=True):
        assert isinstance(parameter.grad, DTensor)
        torch.testing.assert_close(parameter.grad.full_tensor(), whole * 0.5 / expected)
    return expected.item(), before.item(), norm().item()


def test_the_norm_is_global_on_any_mix_of_meshes(pool: Pool) -> None:
    for expected, before, after in pool.run(4, norms_on_mixed_meshes):
        assert before == pytest.approx(expected, rel=1e-6)
        assert after == pytest.approx(0.5, rel=1e-4)


# ------------------------------------------------------------------ what is exchanged, and when


def collectives(keys: str) -> list[dict[str, int]]:
    """Of each of three micro-steps: how often ranks exchange something."""
    config = tiny(keys)
    world = init_world(config.distributed, use_gpu=False)
    model = build_model(config, world)
    tokens = torch.zeros(1, 32, dtype=torch.int64)
    found = []
    for i in range(3):
        begin_micro_step(model, config.distributed, last=i == 2)
        with Counting() as counts:
            model(tokens, tokens).sum().backward()
        found.append(dict(counts.of))
    return found


class Counting(TorchDispatchMode):
    """Counts the collectives that run in it, by their names."""

    def __init__(self) -> None:
        super().__init__()
        self.of: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "c10d" in func.namespace:
            self.of[func._opname] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("mesh", ["full_shard", "no_shard", "HSDP", "shard_grad_op"])
def test_only_the_last_micro_step_exchanges_gradients(pool: Pool, mesh: str) -> None:
    keys = MESHES.get(mesh, "distributed.fsdp_type=shard_grad_op")
    first, second, last = pool.run(4, collectives, keys)[0]

    def gradients(counts: dict[str, int]) -> int:
        return sum(n for name, n in counts.items() if "reduce" in name)

    def weights(counts: dict[str, int]) -> int:
        return sum(n for name, n in counts.items() if "gather" in name)

    assert gradients(first) == gradients(second) == 0
    units = 3 + 2 + 1  # layers, sites, and the rest
    assert gradients(last) == (2 * units if mesh == "HSDP" else units)
    if mesh == "shard_grad_op":
        assert weights(first) > 0, "weights are gathered once"
        assert weights(second) == weights(last) == 0, "and kept for all micro-steps"
