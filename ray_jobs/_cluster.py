"""Whether the cluster has what a job needs."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

import ray
from ray.autoscaler.sdk import request_resources

from modular_lm.config.schema import RayConfig
from modular_lm.errors import ConfigError, RunFailedError

log = logging.getLogger(__name__)

_PATIENCE_S = 600


def use_gpu(config: RayConfig) -> bool:
    """Whether workers train on GPUs: as `ray.use_gpu` says, else if there is one for each.

    Raises ConfigError if GPUs are asked for and there are too few.
    """
    gpus = int(ray.cluster_resources().get("GPU", 0))
    if config.use_gpu is None:
        return gpus >= config.num_workers
    if config.use_gpu and gpus < config.num_workers:
        raise ConfigError(
            f"ray.num_workers={config.num_workers}: each needs a GPU and the cluster has {gpus}; "
            "use fewer workers, or ray.use_gpu=false to train on CPUs"
        )
    return config.use_gpu


def wait_for_cpus(config: RayConfig, stopped: Callable[[], str | None]) -> bool:
    """Wait until there are CPUs for the workers and one for Ray Data; False if `stopped` before.

    A cluster that can grow is asked to. Raises RunFailedError after ten minutes.
    """
    needed = config.num_workers * config.cpus_per_worker + 1
    deadline = time.monotonic() + _PATIENCE_S
    asked = False
    while (cpus := int(ray.cluster_resources().get("CPU", 0))) < needed:
        if not asked:
            log.warning(
                "%d workers and their data need %d CPUs, the cluster has %d: waiting for more",
                config.num_workers,
                needed,
                cpus,
            )
            request_resources(bundles=[{"CPU": config.cpus_per_worker}] * config.num_workers)
            asked = True
        if stopped():
            return False
        if time.monotonic() > deadline:
            raise RunFailedError(
                f"ray.num_workers={config.num_workers}: needs {needed} CPUs with those for the "
                f"data, and after {_PATIENCE_S // 60} minutes the cluster has {cpus}; use fewer "
                "workers or a larger cluster"
            )
        time.sleep(1)
    return True
