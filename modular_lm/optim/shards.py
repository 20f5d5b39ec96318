"""A rank's own part of a tensor that may be sharded, and which rank counts it."""

from __future__ import annotations

from typing import cast

import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor


def local_part(tensor: Tensor) -> Tensor:
    """What this rank holds of `tensor`, sharing its memory; the tensor itself if it is plain."""
    return cast("Tensor", tensor.to_local()) if isinstance(tensor, DTensor) else tensor


def counts_here(tensor: Tensor) -> bool:
    """Whether this rank counts its part of `tensor` in a sum over all ranks.

    Of the ranks that hold the same part (replicas along a dimension of the mesh, meshes that exist
    several times over the world, plain tensors) the one that comes first does.
    """
    if not isinstance(tensor, DTensor):
        return not dist.is_initialized() or dist.get_rank() == 0
    mesh = tensor.device_mesh
    here = mesh.get_coordinate()
    if here is None or mesh.mesh.min().item() != 0:
        return False
    pairs = zip(tensor.placements, here, strict=True)
    return all(place == 0 for placement, place in pairs if placement.is_replicate())
