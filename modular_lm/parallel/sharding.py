"""Data parallelism: who holds which part of the weights, and when gradients meet.

FSDP2 in all forms, so that mixed precision, accumulation and checkpoints are the same for all: one
unit per layer and aggregation site, and the rest. Where nothing is shared (`no_shard`, or one rank
a group) its replicating form leaves the weights whole and all-reduces gradients, as DDP does.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import nn
from torch.distributed._composable.replicate_with_fsdp import ReplicateModule, replicate
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from modular_lm.config.schema import DistributedConfig
from modular_lm.model.columns import layers_of
from modular_lm.model.lm import LanguageModel
from modular_lm.parallel.mesh import SHARD, data_mesh

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def units_of(model: LanguageModel) -> Iterator[nn.Module]:
    """The layers of all columns, and the aggregation sites."""
    for name in model.column_names:
        yield from layers_of(model, name)
    yield from model.aggs


def shard(model: LanguageModel, config: DistributedConfig, mesh: DeviceMesh) -> None:
    """Apply data parallelism and mixed precision in place; mesh: of all ranks.

    Weights are computed with in `model_dtype`, gradients reduced, and kept, in fp32.
    """
    compute = DTYPES[config.model_dtype]
    if mesh.size() == 1 and compute == torch.float32:
        return  # nothing to exchange or to cast: no copies of the weights either
    policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32)
    if mesh[SHARD].size() == 1:
        # Not of the public API yet; the public `replicate` is DDP, with hooks and names of its own.
        apply = functools.partial(replicate, mesh=data_mesh(mesh), mp_policy=policy)
        free = apply
    else:
        apply = functools.partial(
            fully_shard, mesh=data_mesh(mesh), mp_policy=policy, reshard_after_forward=False
        )
        free = functools.partial(apply, reshard_after_forward=config.fsdp_type == "full_shard")
    for unit in units_of(model):
        free(unit)
    apply(model)


def begin_micro_step(model: nn.Module, config: DistributedConfig, *, last: bool) -> None:
    """To be called before each forward and backward pass of an optimizer step.

    Only the last one exchanges gradients, over all dimensions of the mesh, and gives up the weights
    to compute with, unless these are freed after each pass anyway.
    """
    if isinstance(model, FSDPModule):
        freed = config.fsdp_type == "full_shard" and not isinstance(model, ReplicateModule)
        model.set_requires_gradient_sync(last)
        model.set_reshard_after_backward(last or freed)
        for unit in model.modules():
            if isinstance(unit, FSDPModule) and not any(p.requires_grad for p in unit.parameters()):
                # It may never run, and FSDP looks for gradients that wait in what has not run.
                unit.set_requires_gradient_sync(True, recurse=False)
