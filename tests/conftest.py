"""Fixtures shared by all tests: the data beside the checkout, one Ray and one pool of ranks for the
session."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.pool import Pool
from tests.slurm import slurm as slurm
from tests.support import end, free_ports, listens, wait_until

# Many small processes on few cores: threads within each would only get in each other's way.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Ray reads its token once, at the first import in a process, so it must lie there before.
_TOKEN_FOLDER = tempfile.TemporaryDirectory(prefix="mlm-token")
_TOKEN = Path(_TOKEN_FOLDER.name) / "token"
_TOKEN.touch(mode=0o600)
_TOKEN.write_text(secrets.token_hex(32))
os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=str(_TOKEN))
# Read at the first import as well.
os.environ["RAY_ENABLE_AUTO_CONNECT"] = "0"

REPO = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real text, tokenizers and golden numbers, which lies beside the checkout."""
    folder = REPO.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"needs the shared data folder, not found at {folder}")
    return folder


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One prepared built-in corpus for the session."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    """Processes that run a task as the ranks of one group."""
    with tempfile.TemporaryDirectory(prefix="mlm", dir="/tmp") as short, Pool(Path(short)) as pool:
        yield pool


@pytest.fixture(scope="session")
def ray_head(cache: Path) -> Iterator[dict[str, str]]:
    """The environment in which jobs join a Ray of this session's own, or are submitted to it."""
    port, dashboard, agent = free_ports(3)
    environment = {
        **os.environ,
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
        "RAY_idle_worker_killing_time_threshold_ms": "600000",
        "MODULAR_LM_CACHE": str(cache),
        "PYTHONUNBUFFERED": "1",
    }
    environment.pop("RAY_ADDRESS", None)
    with tempfile.TemporaryDirectory(prefix="mlm", dir="/tmp") as short:
        head = subprocess.Popen(
            [
                *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block"),
                *("--node-ip-address=127.0.0.1", f"--port={port}", "--num-cpus=6"),
                *("--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}"),
                # Else two Rays on one machine want the same port, and one takes no jobs.
                f"--dashboard-agent-listen-port={agent}",
                *(f"--temp-dir={short}", "--object-store-memory=300000000"),
                "--disable-usage-stats",
            ],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            wait_until(lambda: listens(port) and listens(dashboard), "the Ray head", 90)
            yield {
                **environment,
                "RAY_ADDRESS": f"127.0.0.1:{port}",
                "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard}",  # of `ray job`
            }
        finally:
            end(head)


@pytest.fixture(scope="module")
def ray_session_joined(ray_head: dict[str, str]) -> Iterator[None]:
    """This process as a driver on the session's Ray."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ray_head.items():
            patch.setenv(name, value)
        from ray_jobs._session import ray_session

        with ray_session():
            yield
