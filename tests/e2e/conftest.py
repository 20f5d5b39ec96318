"""Whole jobs as a user starts them: subprocesses on one shared Ray, in folders of their own."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from modular_lm.tracking.run_folder import RunFolder
from tests.e2e.support import TINY, Jobs, end, free_ports, listens, wait_until


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One prepared built-in corpus for the session."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def ray_head(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Iterator[dict[str, str]]:
    """The environment in which jobs join a Ray of this session's own."""
    token = tmp_path_factory.mktemp("ray") / "token"
    token.write_text(secrets.token_hex(32))
    token.chmod(0o600)
    port, dashboard = free_ports(2)
    environment = {
        **os.environ,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
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
                *(f"--temp-dir={short}", "--object-store-memory=300000000"),
                "--disable-usage-stats",
            ],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            wait_until(lambda: listens(port) and listens(dashboard), "the Ray head", 90)
            yield {**environment, "RAY_ADDRESS": f"127.0.0.1:{port}"}
        finally:
            end(head)


@pytest.fixture(scope="session")
def uninterrupted(ray_head: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A run of 40 steps with two workers, nothing happening."""
    folder = RunFolder(tmp_path_factory.mktemp("runs") / "whole")
    Jobs(ray_head).run("ray_jobs.train", *TINY, f"dump_dir={folder.path}")
    return folder


@pytest.fixture
def jobs(ray_head: dict[str, str]) -> Iterator[Jobs]:
    """Jobs on the session's Ray; whatever still runs at the end of the test is ended."""
    started = Jobs(ray_head)
    yield started
    for process in started.started:
        end(process)


@pytest.fixture
def plain_jobs(cache: Path) -> Iterator[Jobs]:
    """Jobs without a Ray to join."""
    environment = {**os.environ, "MODULAR_LM_CACHE": str(cache), "PYTHONUNBUFFERED": "1"}
    environment.pop("RAY_ADDRESS", None)
    started = Jobs(environment)
    yield started
    for process in started.started:
        end(process)
