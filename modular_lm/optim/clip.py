"""The norm of all gradients of all ranks, whatever meshes they lie on.

PyTorch's `clip_grad_norm_` cannot add gradients of different meshes (tensor-parallel matrices and
norms that are only data-parallel), and each rank of it waits for a collective per mesh. Here each
rank adds up squares of what it holds, so that one sum of one number over all ranks is the whole
norm, squared.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from modular_lm.optim.shards import counts_here, local_part


def local_squares(parameters: Iterable[nn.Parameter], device: torch.device) -> Tensor:
    """This rank's summand of the squared norm of all gradients: a scalar in fp64 on `device`.

    Of replicated gradients one rank counts each element. Brings gradients that are still to be
    summed over ranks into the placement of their parameters.
    """
    counts: dict[Any, bool] = {}  # the same for all gradients that lie alike
    counted = []
    for gradient in _gradients(parameters):
        lies = getattr(gradient, "device_mesh", None), getattr(gradient, "placements", None)
        if lies not in counts:
            counts[lies] = counts_here(gradient)
        if counts[lies]:
            counted.append(local_part(gradient))
    if not counted:
        return torch.zeros((), dtype=torch.float64, device=device)
    return torch.stack(torch._foreach_norm(counted)).double().square().sum()


def scale_gradients(parameters: Iterable[nn.Parameter], norm: Tensor, limit: float) -> None:
    """Scale all gradients, whose global norm is `norm`, down to a norm of at most `limit`.

    Multiplies in any case, by 1 if need be, so that nothing waits for the device.
    """
    factor = (limit / (norm + 1e-6)).clamp(max=1.0)
    if parts := [local_part(gradient) for gradient in _gradients(parameters)]:
        torch._foreach_mul_(parts, factor.to(parts[0].dtype))


def _gradients(parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    found = []
    for parameter in parameters:
        gradient = parameter.grad
        if gradient is None:
            continue
        placements = getattr(parameter, "placements", None)
        if isinstance(gradient, DTensor) and gradient.placements != placements:
            gradient = parameter.grad = gradient.redistribute(placements=placements)
        found.append(gradient)
    return found
