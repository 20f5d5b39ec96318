"""A store that is away, slow, refusing or not there yet: points arrive once, and nobody waits."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from modular_lm.tracking import mlflow_run
from modular_lm.tracking.follower import Follower
from modular_lm.tracking.mlflow_projection import MlflowProjection
from modular_lm.tracking.run_folder import RunFolder
from tests.tracking.mlflow_store import EXPERIMENT, client, new_run, project, runs, steps, train

# ------------------------------------------------------------------ trouble


def test_an_unreachable_server_neither_raises_nor_holds_up(
    folder: RunFolder, runs_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train(folder, 1, 3)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    began = time.monotonic()
    uri = f"http://127.0.0.1:{port}"
    running = Follower(folder, [MlflowProjection(folder, uri, EXPERIMENT, "demo")])
    running.start()
    running.stop()
    assert time.monotonic() - began < 21
    warnings = [r.message for r in caplog.records if r.name.startswith("modular_lm")]
    assert len([w for w in warnings if w.startswith("MLflow: ")]) == 1
    project(folder)
    assert steps(runs_dir, "loss/out") == [1, 2, 3]


def test_a_server_that_hangs_is_given_up(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        uri = f"http://127.0.0.1:{silent.getsockname()[1]}"
        began = time.monotonic()
        running = Follower(folder, [MlflowProjection(folder, uri, EXPERIMENT, "demo")])
        running.start()
        running.stop()
        assert 1 < time.monotonic() - began < 15
    assert "left behind" not in caplog.text
    assert "timed out" in caplog.text


@pytest.mark.slow
def test_runs_that_start_at_once_share_a_new_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    script = (
        "import sys; from modular_lm.tracking import *; folder = RunFolder(sys.argv[1]);"
        "replay(folder, MlflowProjection(folder, None, 'modular-lm', 'x'))"
    )
    folders = [new_run(tmp_path / name, name) for name in ("a", "b", "c")]
    started = [
        subprocess.Popen([sys.executable, "-c", script, str(folder.path)]) for folder in folders
    ]
    assert [process.wait(120) for process in started] == [0, 0, 0]
    assert len(runs(tmp_path)) == 3
    assert {p.name for p in tmp_path.iterdir()} == {"a", "b", "c", "mlflow.db", "mlartifacts"}


def test_artifacts_that_fail_do_not_hold_up_points(
    folder: RunFolder,
    runs_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def refuse(*_: Any) -> None:
        raise PermissionError("no bucket")

    with monkeypatch.context() as patched:
        patched.setattr(MlflowClient, "log_artifact", refuse)
        train(folder, 1, 3)
        project(folder)
    assert steps(runs_dir, "loss/out") == [1, 2, 3]
    assert caplog.text.count("no artifacts for now: PermissionError: no bucket") == 1
    project(folder)
    (run,) = runs(runs_dir)
    assert "config.yaml" in {a.path for a in client(runs_dir).list_artifacts(run.info.run_id)}


@pytest.mark.parametrize("batch_arrives", [True, False])
@pytest.mark.parametrize("failing_call", [1, 2, 4])
def test_nothing_is_lost_or_doubled_when_a_batch_fails(
    folder: RunFolder,
    runs_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    failing_call: int,
    batch_arrives: bool,
) -> None:
    """Small batches, one of which fails, before or after the store has taken it."""
    monkeypatch.setattr(mlflow_run, "_METRICS_PER_BATCH", 7)
    train(folder, 1, 10)
    for step in (5, 10):
        folder.eval_metrics.append({"global_step": step, "validation/all/nll": 2.5})
    send = MlflowClient.log_batch
    calls = 0

    def unreliable(client: MlflowClient, run_id: str, metrics: Any = (), **rest: Any) -> None:
        nonlocal calls
        calls += bool(metrics)
        failing = metrics and calls == failing_call
        if batch_arrives or not failing:
            send(client, run_id, metrics=metrics, **rest)
        if failing:
            raise ConnectionError("cable pulled")

    monkeypatch.setattr(MlflowClient, "log_batch", unreliable)
    with pytest.raises(ConnectionError):
        project(folder)
    monkeypatch.setattr(MlflowClient, "log_batch", send)
    project(folder)
    assert steps(runs_dir, "loss/out") == list(range(1, 11))
    assert steps(runs_dir, "optim/lr") == list(range(1, 11))
    assert steps(runs_dir, "validation/all/nll") == [5, 10]
