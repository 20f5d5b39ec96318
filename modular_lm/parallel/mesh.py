"""The device mesh: which ranks exchange what. Its sizes are worked out in `config.distributed`."""

from __future__ import annotations

import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from modular_lm.config.distributed import MeshSizes

REPLICATE, SHARD, TP = "dp_replicate", "dp_shard", "tp"
"""The dimensions of the mesh, outermost first: groups that hold the model, ranks of a group that
share its weights, and neighbours that compute the same rows together."""


def make_mesh(sizes: MeshSizes, device: torch.device) -> DeviceMesh:
    """The mesh of all ranks, always of all three dimensions. A collective."""
    shape = (sizes.dp_replicate, sizes.dp_shard, sizes.tp)
    return init_device_mesh(device.type, shape, mesh_dim_names=(REPLICATE, SHARD, TP))


def data_mesh(mesh: DeviceMesh) -> DeviceMesh:
    """The part of the mesh over which gradients are averaged, without dimensions of size 1."""
    if mesh[SHARD].size() == 1:
        return mesh[REPLICATE]
    return mesh[SHARD] if mesh[REPLICATE].size() == 1 else mesh[REPLICATE, SHARD]
