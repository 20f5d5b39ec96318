"""Muon: momentum whose matrices are made orthogonal (Jordan et al. 2024, arXiv:2502.16982).

Orthogonalising needs whole matrices. Those that lie alike on a mesh are stacked, and the stack is
dealt out over all ranks of the mesh, replicas included, so that each matrix is worked on once: an
all-to-all in bf16 there, and one back.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Placement, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from modular_lm.optim.shards import local_part

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
AT_ONCE = 2**27
"""A rank works on whole matrices of at most so many elements (256 MiB in bf16) at a time, or on
one."""


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov momentum and decoupled weight decay, for 2-d parameters.

    The update is scaled to the size of one of AdamW (0.2 sqrt(max(rows, columns)), Moonshot's
    rule), so that both share learning rate and weight decay. As `torch.optim.Muon` with
    `adjust_lr_fn="match_rms_adamw"`, but each sharded matrix is gathered and worked on by one rank
    alone. Where the tensor `found_inf` is set and holds 1, a step changes nothing.
    """

    found_inf: Tensor | None = None

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        defaults = {"lr": 1e-3, "weight_decay": 0.1, "momentum": 0.95, "ns_steps": 5}
        super().__init__(groups, defaults)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update all parameters that have a gradient. A collective where they are sharded."""
        skip = None if self.found_inf is None else self.found_inf.bool()
        for group in self.param_groups:
            for parameters in _alike([p for p in group["params"] if p.grad is not None]):
                follow = [self._momentum(p, group["momentum"], skip) for p in parameters]
                scale = group["lr"] * 0.2 * math.sqrt(max(parameters[0].shape))
                directions = orthogonalised(follow, parameters[0], group["ns_steps"])
                for p, direction in zip(parameters, directions, strict=True):
                    weights = local_part(p)
                    decayed = weights * (1 - group["lr"] * group["weight_decay"])
                    _assign(weights, decayed.add_(direction, alpha=-scale), skip)

    def _momentum(self, parameter: Tensor, beta: float, skip: Tensor | None) -> Tensor:
        """Take a gradient into the momentum; this rank's part, in bf16, of what to follow."""
        state = self.state[parameter]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        buffer = local_part(state["momentum_buffer"])
        gradient = local_part(cast("Tensor", parameter.grad))
        momentum = buffer.lerp(gradient, 1 - beta)
        follow = gradient.lerp(momentum, beta).bfloat16()
        _assign(buffer, momentum, skip)
        return follow


def orthogonalised(parts: list[Tensor], like: Tensor, steps: int) -> Iterator[Tensor]:
    """This rank's parts of the orthogonalised matrices; parts: its parts of them, in bf16.

    All have the shape and placement of `like`. A collective where that is sharded.
    """
    if not isinstance(like, DTensor) or like.device_mesh.size() == 1:
        for part in parts:
            yield newton_schulz(part, steps)
        return
    mesh = like.device_mesh
    lying = [_in_stack(placement) for placement in like.placements]
    dealt: list[Placement] = [Shard(0)] * mesh.ndim
    at_once = mesh.size() * max(1, AT_ONCE // like.numel())
    for start in range(0, len(parts), at_once):
        stack = torch.stack(parts[start : start + at_once])
        shape = (len(stack), *like.shape)
        whole = local_part(_sharded(stack, mesh, lying, shape).redistribute(placements=dealt))
        done = torch.empty_like(whole)
        for i, matrix in enumerate(whole):
            done[i] = newton_schulz(matrix, steps)
        back = _sharded(done, mesh, dealt, shape).redistribute(placements=lying)
        yield from local_part(back)


def newton_schulz(matrix: Tensor, steps: int) -> Tensor:
    """A matrix [m, n] with nearly the singular vectors of `matrix` and singular values near 1.

    The quintic iteration of Jordan et al., in bf16: values end between about 0.7 and 1.2.
    """
    a, b, c = COEFFICIENTS
    x = matrix.bfloat16()
    tall = x.shape[0] > x.shape[1]
    if tall:
        x = x.T
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x


def _alike(parameters: list[Tensor]) -> list[list[Tensor]]:
    """Parameters by shape and placement; in the same order on all ranks."""
    found: dict[Any, list[Tensor]] = {}
    for p in parameters:
        where = (p.device_mesh, p.placements) if isinstance(p, DTensor) else None
        found.setdefault((p.shape, where), []).append(p)
    return list(found.values())


def _in_stack(placement: Placement) -> Placement:
    """How a matrix's placement reads for a stack of such matrices."""
    if isinstance(placement, _StridedShard):  # FSDP's, of a dimension that is tensor-parallel too
        return _StridedShard(placement.dim + 1, split_factor=placement.split_factor)
    return Shard(placement.dim + 1) if isinstance(placement, Shard) else placement


def _sharded(
    part: Tensor, mesh: Any, placements: list[Placement], shape: tuple[int, ...]
) -> DTensor:
    """The DTensor of this shape, contiguous, of which `part` is this rank's."""
    _, m, n = shape
    stride = (m * n, n, 1)
    return DTensor.from_local(
        part, mesh, placements, run_check=False, shape=torch.Size(shape), stride=stride
    )


def _assign(target: Tensor, value: Tensor, skip: Tensor | None) -> None:
    """Write `value` to `target`; not where `skip` (a bool on their device) is true."""
    target.copy_(value if skip is None else torch.where(skip, target, value))
