"""AdamW (arXiv:1711.05101), fused: one kernel per parameter group, on GPUs and CPUs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from modular_lm.optim.shards import local_part


class AdamW(torch.optim.AdamW):
    """PyTorch's, on each rank's own shards.

    The update is element-wise, so that shards need not know of each other: parameters of different
    meshes may share a group, and no time goes into DTensor's dispatch. Where the tensor `found_inf`
    is set and holds 1, a step changes nothing.
    """

    found_inf: Tensor | None = None

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        super().__init__(groups, fused=True)

    def _init_group(self, group: dict[str, Any], *lists: list[Tensor]) -> bool:  # type: ignore[override]
        has_complex = super()._init_group(group, *lists)
        for tensors in lists:
            tensors[:] = [local_part(tensor) for tensor in tensors]
        return has_complex
