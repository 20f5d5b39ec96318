"""This process among those that train one model, and how they agree."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import DeviceMesh

from modular_lm.config.distributed import mesh_sizes
from modular_lm.config.schema import DistributedConfig
from modular_lm.errors import EXIT_FAILED, AgreedError, UserFacingError, reason
from modular_lm.parallel.mesh import make_mesh

log = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """This process among those that train one model.

    mesh: of the dimensions of `mesh`; tensor-parallel peers are neighbours in rank and hold the
        same rows: rows are divided among `data_size` ranks, of which this is number `data_rank`
    control: a group on the CPU for small agreements that must not wait for the device
    """

    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh
    control: Any

    @property
    def tp_size(self) -> int:
        return self.mesh.shape[-1]

    @property
    def data_rank(self) -> int:
        return self.rank // self.tp_size

    @property
    def data_size(self) -> int:
        return self.size // self.tp_size

    @property
    def counts_rows(self) -> bool:
        """Whether this rank counts what belongs to rows, which peers of it have, too."""
        return self.rank % self.tp_size == 0

    def sum(self, *values: float) -> list[float]:
        """Each value summed over all ranks (fp64). A collective."""
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total, group=self.control)
        return total.tolist()

    def sum_over_rows(self, *values: float) -> list[float]:
        """`sum` of what belongs to rows: tensor-parallel peers, who have the same, count once."""
        return self.sum(*values if self.counts_rows else (0.0,) * len(values))

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


def init_world(
    distributed: DistributedConfig | None = None, *, use_gpu: bool | None = None
) -> World:
    """Join the process group that Ray Train or torchrun announced; alone without either.

    distributed: decides the mesh; default: all ranks share the weights. use_gpu: default: if this
    machine has a GPU for each of its processes. Raises ConfigError for an impossible mesh.
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
    mesh = make_mesh(mesh_sizes(distributed or DistributedConfig(), size), device)
    control = dist.new_group(backend="gloo") if use_gpu else dist.group.WORLD
    return World(dist.get_rank(), size, device, mesh, control)
