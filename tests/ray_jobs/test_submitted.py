"""What a job on a cluster hands on to its workers, what it warns of, and whom it talks to."""

from __future__ import annotations

import json
import logging
import subprocess
import sys

import pytest

from modular_lm.errors import ConfigError, RunFailedError
from ray_jobs import _session
from ray_jobs._session import _passed, ray_session
from tests.support import REPO, free_ports

SECRET = "hf_0123456789"


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR", raising=False)
    monkeypatch.setenv("HF_TOKEN", SECRET)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow:5000")
    monkeypatch.setenv("MODULAR_LM_CACHE", "/shared/cache")
    monkeypatch.setenv("SECRET_OF_MINE", SECRET)


def submitted(monkeypatch: pytest.MonkeyPatch, **variables: str) -> None:
    values = {"runtime_env": {"env_vars": variables}}
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps(values))
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


def test_what_says_where_things_are_reaches_the_workers_and_no_secret(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Ray writes the runtime environment to a log on every node."""
    with caplog.at_level(logging.INFO):
        passed = _passed()
    assert SECRET not in passed.values()
    assert "HF_TOKEN: not handed to the workers" in caplog.text
    assert SECRET not in caplog.text
    assert passed["MLFLOW_TRACKING_URI"] == "http://mlflow:5000"
    assert passed["MODULAR_LM_CACHE"] == "/shared/cache"
    assert "SECRET_OF_MINE" not in passed
    assert not any(name in passed for name in ("PATH", "HOME", "PYTHONPATH", "RAY_AUTH_TOKEN_PATH"))


def test_what_the_job_carries_is_not_told_twice(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Ray would refuse, and show the values in its message."""
    submitted(monkeypatch, HF_HOME="/shared/hf", RAY_JOB_STOP_WAIT_TIME_S="300")
    assert "HF_HOME" not in _passed()
    assert "MLFLOW_TRACKING_URI" in _passed()
    assert caplog.text == ""


def test_a_job_that_would_be_killed_before_it_has_saved_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    submitted(monkeypatch, HF_TOKEN=SECRET)
    monkeypatch.delenv("RAY_JOB_STOP_WAIT_TIME_S", raising=False)
    with caplog.at_level(logging.WARNING):
        _passed()
    (message,) = caplog.messages
    assert message.startswith("RAY_JOB_STOP_WAIT_TIME_S=3: `ray job stop` kills this job")
    assert SECRET not in caplog.text


def test_an_address_that_is_the_dashboards_or_nobodys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:8265")
    with pytest.raises(ConfigError, match="is where `ray job submit` hands jobs in"), ray_session():
        pass
    (port,) = free_ports(1)
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{port}")
    with pytest.raises(RunFailedError, match="Connection refused"), ray_session():
        pass


def test_a_token_that_is_missing_or_wrong_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.exceptions import AuthenticationError

    def refused() -> None:
        raise AuthenticationError("Unauthenticated")

    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    monkeypatch.setattr(_session, "_join", refused)
    with pytest.raises(RunFailedError, match="Unauthenticated"), ray_session():
        pass


@pytest.mark.e2e
def test_a_ray_of_our_own_beside_another_one(ray_head: dict[str, str]) -> None:
    """Ray Train's helpers ask the dashboard who is alive; they must find theirs."""
    code = """
import ray
from ray_jobs._session import ray_session
with ray_session(num_cpus=2):
    from ray.util.state import list_nodes
    (node,) = ray.get(ray.remote(list_nodes).remote())
    print(node.resources_total["CPU"])
"""
    environment = {n: v for n, v in ray_head.items() if n != "RAY_ADDRESS"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        cwd=REPO,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "2.0"
