"""A Ray session for the length of a job: join the cluster that is there, or start one here.

`RAY_ADDRESS` (set by `ray job submit` and by our SLURM launcher) names a cluster to join. Without
it a Ray of our own starts on this machine and ends with the job; nothing else is touched.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
from collections.abc import Iterator

from modular_lm.errors import RunFailedError, reason

# Logical CPUs beside those of the training workers: tasks of Ray Data, validation, the driver.
SPARE_CPUS = 2

_DEFAULTS = {
    "RAY_ENABLE_AUTO_CONNECT": "0",  # else a late call of Ray would start another Ray
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # else every line of a worker appears twice
    "RAY_DATA_LOG_LEVEL": "ERROR",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "1",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "120",
}


@contextlib.contextmanager
def ray_session(num_cpus: int | None = None) -> Iterator[None]:
    """Ray is initialised inside the block; a Ray that was already there is left as it was.

    num_cpus: logical CPUs of a Ray that is started here; default: the machine's, at least 4. They
    may exceed the physical ones: Ray only counts them.
    Raises RunFailedError if no Ray can be reached or started.
    """
    _environment()
    import ray

    if ray.is_initialized():
        yield
        return
    handler = signal.getsignal(signal.SIGTERM)
    try:
        if os.environ.get("RAY_ADDRESS"):
            _join()
        else:
            _start(num_cpus or max(4, os.cpu_count() or 1))
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        where = os.environ.get("RAY_ADDRESS", "a new one on this machine")
        raise RunFailedError(f"no Ray session (RAY_ADDRESS: {where}): {reason(error)}") from error
    # Ray makes SIGTERM end the process at once; the caller may have had other plans.
    signal.signal(signal.SIGTERM, handler)
    try:
        yield
    finally:
        ray.shutdown()


def _environment() -> None:
    """Settings that Ray reads at import or passes to its workers; the user's own values win."""
    for name, value in _DEFAULTS.items():
        os.environ.setdefault(name, value)


def _join() -> None:
    import ray

    host, _, port = os.environ["RAY_ADDRESS"].rpartition(":")
    if port.isdigit() and "/" not in host:
        # Ray itself would try for minutes.
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()

    # A cluster's processes do not inherit the environment of a driver that joins it.
    passed = {n: v for n, v in os.environ.items() if n in _DEFAULTS or n.startswith("MODULAR_LM_")}
    ray.init(log_to_driver=True, logging_level=logging.WARNING, runtime_env={"env_vars": passed})


def _start(num_cpus: int) -> None:
    # Nobody takes nodes away from a Ray of our own.
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    # Says on every start that Ray made itself a token.
    logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)
    import ray

    ray.init(
        num_cpus=num_cpus,
        # Ray Train asks it who is alive; without it placement groups of killed runs stay.
        include_dashboard=True,
        dashboard_host="127.0.0.1",
        log_to_driver=True,
        logging_level=logging.WARNING,
        _system_config={
            # Keeps idle workers for the next execution of Ray Data instead of starting new ones.
            "idle_worker_killing_time_threshold_ms": 600_000,
            "num_workers_soft_limit": num_cpus + 4,
        },
    )
