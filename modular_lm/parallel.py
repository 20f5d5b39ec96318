"""Spreading a model over processes: process group, device mesh, FSDP2, compile.

Applied to models that know nothing of it: a model only names its units of sharding (the layers of
each column, `aggs`). What learns, and who computes attention, is set here too, since both depend on
the run. One path serves every size: a single process is a world of one.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from modular_lm.config.checks import has_one_chunk
from modular_lm.config.schema import DistributedConfig, TrainConfig
from modular_lm.errors import EXIT_FAILED, AgreedError, UserFacingError, reason
from modular_lm.model.attention import choose_backends
from modular_lm.model.columns import freeze, layers_of
from modular_lm.model.init import init_weights
from modular_lm.model.lm import LanguageModel

log = logging.getLogger(__name__)
T = TypeVar("T")

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class World:
    """This process among those that train one model.

    control: a group on the CPU for small agreements that must not wait for the device.
    """

    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh
    control: Any

    def sum(self, *values: float) -> list[float]:
        """Each value summed over all ranks (fp64). A collective."""
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total, group=self.control)
        return total.tolist()

    def broadcast(self, value: Any) -> Any:
        """Rank 0's `value` on every rank (a picklable object). A collective."""
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.control)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """The `value` of every rank, in their order, on every rank. A collective."""
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.control)
        return values

    def together(self, act: Callable[[], T], failure: str) -> list[T]:
        """Call `act` on every rank and return the results of all. A collective.

        If it fails with an Exception on one rank, every rank raises AgreedError: `failure` and the
        first reason. No rank is left waiting for one that gave up.
        """
        result, error = None, None
        try:
            result = act()
        except (Exception, CheckpointException) as caught:
            rank, cause = self.rank, caught
            if isinstance(caught, CheckpointException):  # raised on every rank, for those it names
                rank, (cause, _) = min(caught.failures.items())
            code = cause.exit_code if isinstance(cause, UserFacingError) else EXIT_FAILED
            error = (f"{failure}: rank {rank}: {reason(cause)}", code)
            log.debug("%s", failure, exc_info=True)
        gathered = self.gather((result, error))
        for _, problem in gathered:
            if problem:
                raise AgreedError(*problem)
        return [each for each, _ in gathered]


def init_world(use_gpu: bool | None = None) -> World:
    """Join the process group that Ray Train or torchrun announced; alone without either.

    use_gpu: default: if this machine has a GPU for each of its processes.
    """
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if use_gpu is None:
        local_size = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        use_gpu = torch.cuda.is_available() and torch.cuda.device_count() >= local_size
    if use_gpu:
        torch.cuda.set_device(local_rank)
    if not dist.is_initialized():
        backend = "nccl" if use_gpu else "gloo"
        if "RANK" in os.environ:
            dist.init_process_group(backend)
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    device = torch.device("cuda", local_rank) if use_gpu else torch.device("cpu")
    size = dist.get_world_size()
    mesh = init_device_mesh(device.type, (size,), mesh_dim_names=("dp_shard",))
    control = dist.new_group(backend="gloo") if use_gpu else dist.group.WORLD
    return World(dist.get_rank(), size, device, mesh, control)


def build_model(config: TrainConfig, world: World) -> LanguageModel:
    """A sharded model with its initial weights, which depend on `seed` and the parameters' names.

    Built without memory on the meta device and materialised shard by shard, so that no rank ever
    holds the whole model. Raises AgreedError if the attention backend asked for cannot be used.
    """
    with torch.device("meta"):
        model = LanguageModel(config.model)
    freeze(model, config.model)
    if has_one_chunk(config.model, config.data.seq_len):
        # With one chunk a sample no aggregation runs: such weights get no gradients, and the
        # optimizer must not wait for any.
        model.aggs.requires_grad_(False)
    (model.backends, *_) = world.together(
        lambda: choose_backends(
            config.distributed.attn_impl,
            config.model,
            seq_len=config.data.seq_len,
            document_mask=config.data.document_mask,
            device=world.device,
            dtype=DTYPES[config.distributed.model_dtype],
        ),
        "attention",
    )
    shard(model, config.distributed, world.mesh)
    model.to_empty(device=world.device)
    init_weights(model, config.seed)
    return model


def shard(model: LanguageModel, config: DistributedConfig, mesh: DeviceMesh) -> None:
    """Apply compile and FSDP2 in place: one unit per layer and aggregation site, and the rest."""
    policy = MixedPrecisionPolicy(
        param_dtype=DTYPES[config.model_dtype], reduce_dtype=torch.float32
    )
    reshard = config.fsdp_type == "full_shard"
    columns = (block for name in model.column_names for block in layers_of(model, name))
    for unit in [*columns, *model.aggs]:
        if config.compile:
            unit.compile()
        fully_shard(unit, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard)
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)


def sync_gradients(model: nn.Module, enabled: bool) -> None:
    """Whether the next backward passes reduce gradients over the ranks."""
    model.set_requires_gradient_sync(enabled)  # type: ignore[operator]
