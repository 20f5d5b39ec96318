"""A Ray session for the length of a job: join the cluster that is there, or start one here.

`RAY_ADDRESS` (set by `ray job submit` and by our SLURM launcher) names a cluster to join. Without
it a Ray of our own starts on this machine and ends with the job; nothing else is touched.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import random
import re
import signal
import socket
from collections.abc import Iterator

from modular_lm.errors import ConfigError, RunFailedError, UserFacingError, reason
from modular_lm.submission import STOP_WAIT, submission
from ray_jobs._quiet import quieten

log = logging.getLogger(__name__)

# Logical CPUs beside those of the training workers: tasks of Ray Data, validation, the driver.
SPARE_CPUS = 2

_DEFAULTS = {
    "RAY_ENABLE_AUTO_CONNECT": "0",  # else a late call of Ray would start another Ray
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # else every line of a worker appears twice
    "RAY_DATA_LOG_LEVEL": "ERROR",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_IGNORE_UNHANDLED_ERRORS": "1",  # of calls whose answer nobody waits for: statistics
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "1",
    # It would let workers go on until their node is gone; `_attempts` looks itself, and acts.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    # Only placing takes this time, of workers for which there was room a moment ago.
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "30",
}
# Of a driver's environment what its workers need: where caches and stores are.
_PASSED = ("MODULAR_LM_", "MLFLOW_", "HF_", "AWS_", "FSSPEC_")
# But no credentials: every node's runtime_env_agent.log shows the variables with their values.
_SECRET = re.compile("TOKEN|PASSWORD|SECRET|KEY|CREDENTIAL")
# Seconds between SIGTERM and SIGKILL in which a checkpoint may not fit.
SHORT_STOP_S = 30
_DASHBOARD = "RAY_API_SERVER_ADDRESS"


@contextlib.contextmanager
def ray_session(num_cpus: int | None = None) -> Iterator[None]:
    """Ray is initialised inside the block; a Ray that was already there is left as it was.

    num_cpus: logical CPUs of a Ray that is started here; default: the machine's, at least 4. They
    may exceed the physical ones: Ray only counts them.
    Raises RunFailedError if no Ray can be reached or started, ConfigError for an address that
    belongs elsewhere.
    """
    _environment()
    import ray

    if ray.is_initialized():
        yield
        return
    quieten()
    handler, dashboard = signal.getsignal(signal.SIGTERM), os.environ.get(_DASHBOARD)
    try:
        if os.environ.get("RAY_ADDRESS"):
            _join()
        else:
            _start(num_cpus or max(4, os.cpu_count() or 1))
    except UserFacingError:
        raise
    # Ray raises bare Exceptions where its processes do not come up.
    except Exception as error:
        where = os.environ.get("RAY_ADDRESS", "a new one on this machine")
        raise RunFailedError(f"no Ray session (RAY_ADDRESS: {where}): {reason(error)}") from error
    # Ray makes SIGTERM end the process at once; the caller may have had other plans.
    signal.signal(signal.SIGTERM, handler)
    try:
        yield
    finally:
        ray.shutdown()
        if dashboard is None:
            os.environ.pop(_DASHBOARD, None)
        else:
            os.environ[_DASHBOARD] = dashboard


def _environment() -> None:
    """Settings that Ray reads at import or passes to its workers; the user's own values win."""
    for name, value in _DEFAULTS.items():
        os.environ.setdefault(name, value)


def _join() -> None:
    address = os.environ["RAY_ADDRESS"]
    if address.startswith(("http://", "https://")):
        raise ConfigError(
            f"RAY_ADDRESS={address}: is where `ray job submit` hands jobs in; a job that is "
            "started here joins at HOST:PORT (6379 by default), or unset RAY_ADDRESS"
        )
    import ray

    host, _, port = address.rpartition(":")
    if port.isdigit() and "/" not in host:
        # Ray itself would try for minutes.
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
        variables = {**_passed(), **_dashboard_of(address)}
    else:
        variables = _passed()
    ray.init(log_to_driver=True, logging_level=logging.WARNING, runtime_env={"env_vars": variables})


def _dashboard_of(address: str) -> dict[str, str]:
    """What tells workers where the dashboard of the Ray at `address` is.

    Ray Train asks it who is alive; by itself it would look for the one Ray on its machine.
    """
    from ray._private.ray_constants import DASHBOARD_ADDRESS, KV_NAMESPACE_DASHBOARD
    from ray._raylet import GcsClient  # pyright: ignore[reportAttributeAccessIssue]
    from ray.exceptions import RayError

    key, namespace = DASHBOARD_ADDRESS.encode(), KV_NAMESPACE_DASHBOARD
    try:
        found = GcsClient(address=address).internal_kv_get(key, namespace=namespace)
    except (RuntimeError, RayError):
        return {}  # ray.init, which is next, says what is wrong
    return {_DASHBOARD: f"http://{found.decode()}"} if found else {}


def _passed() -> dict[str, str]:
    """The variables for the runtime environment: a cluster's processes do not inherit those of a
    driver that joins it."""
    job = submission()
    if job is not None and job.stop_wait_s < SHORT_STOP_S:
        log.warning(
            "%s=%d: `ray job stop` kills this job so many seconds after it asked it to save; "
            "submit with --runtime-env cluster/runtime_env.yaml, which sets it to more",
            STOP_WAIT,
            job.stop_wait_s,
        )
    # What the job carries reaches the workers as it is; Ray refuses to be told twice, and its
    # message would show the values.
    carried = job.carried if job else frozenset()
    passed = {
        name: value
        for name, value in os.environ.items()
        if (name in _DEFAULTS or name.startswith(_PASSED)) and name not in carried
    }
    secrets = sorted(name for name in passed if _SECRET.search(name))
    if secrets and job is None:
        log.info(
            "%s: not handed to the workers, for Ray would write it to its logs; they have it "
            "where the nodes started Ray with it",
            ", ".join(secrets),
        )
    return {name: value for name, value in passed.items() if name not in secrets}


def _start(num_cpus: int) -> None:
    # Says on every start that Ray made itself a token.
    logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)
    import ray

    port = _free_port()
    # Its workers inherit it. Without it they would look for the one Ray on this machine.
    os.environ[_DASHBOARD] = f"http://127.0.0.1:{port}"
    with _own_process_groups():
        ray.init(
            num_cpus=num_cpus,
            # Ray Train asks it who is alive; without it placement groups of killed runs stay.
            include_dashboard=True,
            dashboard_host="127.0.0.1",
            dashboard_port=port,
            log_to_driver=True,
            logging_level=logging.WARNING,
            _system_config={
                # Keeps idle workers for the next execution of Ray Data, which starts no new ones.
                "idle_worker_killing_time_threshold_ms": 600_000,
                "num_workers_soft_limit": num_cpus + 4,
            },
        )


@contextlib.contextmanager
def _own_process_groups() -> Iterator[None]:
    """Ray's processes begin in process groups of their own.

    Signals that reach a job's whole group (of `timeout` or `kill %1`, say) are for the driver,
    which has the workers save a checkpoint first; Ray shields its processes from SIGINT alone. They
    still end with the driver, by the kernel's death signal.
    """
    from ray._private import services

    plain = services.ConsolePopen
    services.ConsolePopen = functools.partial(plain, process_group=0)
    try:
        yield
    finally:
        services.ConsolePopen = plain


def _free_port() -> int:
    """A port of loopback that is free, and outside of the range that clients are given."""
    for port in random.Random().sample(range(21000, 32000), 100):
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
    raise OSError("no free port on 127.0.0.1")
