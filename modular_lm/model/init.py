"""Initial weights: each parameter drawn by itself, from a generator seeded by (seed, its name).

So they are the same for every number of ranks and every placement, and a parameter that is added
(an aggregation site, a module) shifts no other. How each parameter starts is said by the module
that holds it, in `initial_weights()` (see `layers`).
"""

from __future__ import annotations

import hashlib
from typing import cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from modular_lm.model.layers import Initial


@torch.no_grad()
def init_weights(model: nn.Module, seed: int) -> None:
    """Overwrite all parameters, plain or sharded, on any device but meta.

    No communication. One whole parameter at a time is drawn in fp32 on the CPU. Raises ValueError
    for a parameter whose start no module states, or that has no memory yet.
    """
    starts = _collect(model)
    for name, parameter in model.named_parameters():
        if name not in starts:
            raise ValueError(f"parameter {name}: no module says how it starts")
        if parameter.is_meta:
            raise ValueError(f"parameter {name}: is on the meta device, call to_empty first")
        full = draw(starts[name], parameter.shape, seed, name).to(parameter.dtype)
        fill(parameter, full)


def draw(start: Initial, shape: torch.Size, seed: int, name: str) -> Tensor:
    """The whole initial value of parameter `name`, fp32 on the CPU."""
    full = torch.full(shape, start.mean, dtype=torch.float32, device="cpu")
    if start.std == 0:
        return full
    key = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    generator = torch.Generator("cpu").manual_seed(int.from_bytes(key, "little"))
    low, high = start.mean - 3 * start.std, start.mean + 3 * start.std
    return nn.init.trunc_normal_(full, start.mean, start.std, low, high, generator=generator)


def _collect(model: nn.Module) -> dict[str, Initial]:
    starts: dict[str, Initial] = {}
    for prefix, module in model.named_modules():
        own = getattr(module, "initial_weights", None)
        if own is not None:
            prefix = f"{prefix}." if prefix else ""
            starts |= {prefix + name: start for name, start in own().items()}
    return starts


@torch.no_grad()
def fill(parameter: Tensor, full: Tensor) -> None:
    """Write this rank's part of a whole value into a parameter. No communication."""
    if isinstance(parameter, DTensor):
        mesh, placements = parameter.device_mesh, parameter.placements
        full = distribute_tensor(full, mesh, placements, src_data_rank=None).to_local()
        parameter = cast("Tensor", parameter.to_local())
    parameter.copy_(full)
