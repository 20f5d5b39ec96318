"""What the cluster has room for, and which of its nodes will be taken away."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

import ray
from ray._private import state
from ray.autoscaler.sdk import request_resources

from modular_lm.config.checks import largest_world, world_sizes
from modular_lm.config.schema import RayConfig, TrainConfig
from modular_lm.errors import ConfigError, RunFailedError

log = logging.getLogger(__name__)

_PATIENCE_S = 600
# How long what an earlier worker group held may take to be given back.
_SETTLE_S = 10


def use_gpu(config: RayConfig) -> bool:
    """Whether workers train on GPUs: as `ray.use_gpu` says, else if there is one for each.

    Raises ConfigError if GPUs are asked for and there are too few.
    """
    gpus, fewest = int(ray.cluster_resources().get("GPU", 0)), world_sizes(config)[0]
    if config.use_gpu is None:
        return gpus >= fewest
    if config.use_gpu and gpus < fewest:
        raise ConfigError(
            f"ray.num_workers={config.num_workers}: each needs a GPU and the cluster has {gpus}; "
            "use fewer workers, or ray.use_gpu=false to train on CPUs"
        )
    return config.use_gpu


def leaving() -> set[str]:
    """The addresses of the nodes that Ray has been told will be taken away."""
    draining = state.state.get_draining_nodes()
    nodes = ray.nodes() if draining else []
    return {node["NodeManagerAddress"] for node in nodes if node["NodeID"] in draining}


def room_for(config: RayConfig, on_gpu: bool, *, free: bool = False) -> int:
    """How many workers the nodes that stay can hold; `free`: beside all that runs on them now.

    One CPU of the cluster is kept for Ray Data.
    """
    draining = state.state.get_draining_nodes()
    nodes = [n for n in ray.nodes() if n["Alive"] and n["NodeID"] not in draining]
    now = state.available_resources_per_node() if free else {}
    has = [now.get(n["NodeID"], {}) if free else n["Resources"] for n in nodes]
    needs = {"CPU": config.cpus_per_worker, **({"GPU": 1} if on_gpu else {})}
    fit = sum(min(int(node.get(what, 0) // n) for what, n in needs.items()) for node in has)
    spare = int(sum(node.get("CPU", 0) for node in has)) - 1
    return max(0, min(fit, spare // config.cpus_per_worker))


def wait_for_workers(
    config: TrainConfig, on_gpu: bool, stopped: Callable[[], str | None]
) -> int | None:
    """Wait until there is room for the workers; how many, or None if `stopped` before.

    As many as there is room for and as form the mesh, if `ray.num_workers` is a range. A cluster
    that can grow is asked to. Raises RunFailedError after ten minutes.
    """
    c, began, asked = config.ray, time.monotonic(), False
    while not stopped():
        room, free = room_for(c, on_gpu), room_for(c, on_gpu, free=True)
        size, waited = largest_world(config, free), time.monotonic() - began
        # Others may hold the rest for long; what an earlier group of ours held comes back at once.
        if size and (size >= largest_world(config, room) or waited > _SETTLE_S):
            return size
        if not asked and waited > _SETTLE_S:
            log.warning(
                "%s, and it has room for %d, %d of it free: waiting", _wanted(c), room, free
            )
            ask_for(c, world_sizes(c)[1])
            asked = True
        if waited > _PATIENCE_S:
            raise RunFailedError(
                f"{_wanted(c)}, and after {_PATIENCE_S // 60} minutes it has room for {room}, "
                f"{free} of it free; use fewer workers or a larger cluster"
            )
        time.sleep(0.5)
    return None


def ask_for(config: RayConfig | None = None, workers: int = 0) -> None:
    """Have a cluster that can grow become able to hold so many workers in all; none: as it likes.

    Holds until the next call, whoever makes it.
    """
    request_resources(bundles=[{"CPU": config.cpus_per_worker}] * workers if config else [])


def _wanted(c: RayConfig) -> str:
    return (
        f"ray.num_workers={c.num_workers}: the cluster must hold them, with {c.cpus_per_worker} "
        "CPUs each, beside one CPU for the data"
    )
