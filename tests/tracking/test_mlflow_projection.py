"""MLflow ends up with what the files say, each point once, whatever goes wrong on the way."""

from __future__ import annotations

import json
import math
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from mlflow import MlflowClient
from mlflow.entities import Metric, Run

from modular_lm.errors import ConfigError
from modular_lm.tracking import mlflow_run
from modular_lm.tracking.follower import Follower, replay
from modular_lm.tracking.mlflow_projection import MlflowProjection, checkpoint_list, tracking_uri
from modular_lm.tracking.mlflow_run import Point, batches
from modular_lm.tracking.run_folder import RunFolder, write_text_atomic

EXPERIMENT = "modular-lm"
CONFIG = {"name": "demo", "optim": {"lr": 0.001}, "data": {"sources": {"a b": 1.0}}, "none": None}


def _new_run(path: Path, uid: str = "uid-1") -> RunFolder:
    folder = RunFolder(path)
    folder.create()
    write_text_atomic(folder.config, yaml.safe_dump(CONFIG))
    write_text_atomic(folder.base_config, "name: demo\n")
    folder.append_event("created", uid=uid, name="demo", global_batch_size=8)
    _begin_attempt(folder, 1, 0)
    return folder


def _begin_attempt(folder: RunFolder, attempt: int, step: int, changes: tuple = ()) -> None:
    folder.append_event(
        "attempt",
        attempt=attempt,
        start_step=step,
        world_size=2,
        hosts=["n0", "n1"],
        config_changes=list(changes),
    )


def _train(folder: RunFolder, first: int, last: int) -> None:
    for step in range(first, last + 1):
        folder.metrics.append({"global_step": step, "loss/out": 5 / step, "optim/lr": 1e-3})


def _end(folder: RunFolder, status: str, step: int) -> None:
    folder.append_event("end", status=status, step=step, exit_code=0, reason="because")


def _project(folder: RunFolder, uri: str | None = None) -> MlflowProjection:
    projection = MlflowProjection(folder, uri, EXPERIMENT, "demo")
    replay(folder, projection)
    return projection


def _client(runs_dir: Path) -> MlflowClient:
    return MlflowClient(tracking_uri=f"sqlite:///{runs_dir / 'mlflow.db'}")


def _runs(runs_dir: Path) -> list[Run]:
    client = _client(runs_dir)
    experiment = client.get_experiment_by_name(EXPERIMENT)
    return list(client.search_runs([experiment.experiment_id])) if experiment else []


def _steps(runs_dir: Path, key: str) -> list[int]:
    (run,) = _runs(runs_dir)
    history = _client(runs_dir).get_metric_history(run.info.run_id, key)
    return sorted(metric.step for metric in history)


@pytest.fixture
def folder(runs_dir: Path) -> RunFolder:
    return _new_run(runs_dir / "demo")


# ------------------------------------------------------------------ what is there


def test_a_whole_run(folder: RunFolder, runs_dir: Path) -> None:
    _train(folder, 1, 5)
    folder.eval_metrics.append({"global_step": 5, "validation/a b/nll": 2.5})
    (folder.code / "modular_lm").mkdir(parents=True)
    (folder.code / "modular_lm" / "x.py").write_text("x = 1\n")
    (folder.code / "snapshot.json").write_text('{"git_commit": "abc", "dirty": true}')
    saved = folder.checkpoints / "0000000005"
    folder.append_event("checkpoint", step=5, path=str(saved), bytes=1, seconds=0.1)
    _end(folder, "done", 5)
    _project(folder)

    (run,) = _runs(runs_dir)
    assert (run.info.run_name, run.info.status) == ("demo", "FINISHED")
    events = {event["event"]: event for event in folder.events()}
    assert run.info.start_time == mlflow_run.milliseconds(events["created"]["time"])
    assert run.info.end_time == mlflow_run.milliseconds(events["end"]["time"])
    assert run.data.params == {
        "name": "demo",
        "optim.lr": "0.001",
        "data.sources.a b": "1.0",
        "none": "null",
    }
    expected = {
        "name": "demo",
        "dump_dir": str(folder.path),
        "world_size": "2",
        "hosts": '["n0", "n1"]',
        "status": "done",
        "mlflow.source.git.commit": "abc",
        "git_dirty": "true",
        "checkpoint.step": "5",
        "checkpoint.path": str(saved),
    }
    assert expected.items() <= run.data.tags.items()
    assert _steps(runs_dir, "loss/out") == [1, 2, 3, 4, 5]
    assert _steps(runs_dir, "validation/a b/nll") == [5]
    assert run.data.metrics["loss/out"] == 1.0


def test_points_keep_the_time_of_their_line(folder: RunFolder, runs_dir: Path) -> None:
    _train(folder, 1, 1)
    _project(folder)
    (run,) = _runs(runs_dir)
    (metric,) = _client(runs_dir).get_metric_history(run.info.run_id, "loss/out")
    (line,) = folder.metrics
    assert metric.timestamp == mlflow_run.milliseconds(line["created_at"])


def test_artifacts_lie_beside_the_store(folder: RunFolder, runs_dir: Path) -> None:
    saved = folder.checkpoints / "0000000005"
    saved.mkdir(parents=True)
    (saved / "COMPLETE").touch()
    folder.append_event("checkpoint", step=5, path=str(saved))
    folder.append_event("checkpoint", step=2, path=str(folder.checkpoints / "0000000002"))
    folder.append_event("checkpoint", step=9, path="s3://bucket/9")
    (folder.code / "configs").mkdir(parents=True)
    (folder.code / "configs" / "x.yaml").write_text("")
    _project(folder)
    (run,) = _runs(runs_dir)
    artifacts = runs_dir / "mlartifacts" / run.info.run_id / "artifacts"
    assert {str(p.relative_to(artifacts)) for p in artifacts.rglob("*") if p.is_file()} == {
        "base_config.yaml",
        "checkpoints.json",
        "code/configs/x.yaml",
        "config.yaml",
        "events.jsonl",
    }
    listed = json.loads((artifacts / "checkpoints.json").read_text())
    assert listed == checkpoint_list(folder)
    assert [(c["step"], c["complete"]) for c in listed] == [(2, False), (5, True), (9, True)]
    names = {a.path for a in _client(runs_dir).list_artifacts(run.info.run_id)}
    assert "checkpoints.json" in names


@pytest.mark.parametrize(
    ("status", "expected"), [("done", "FINISHED"), ("failed", "FAILED"), ("stopped", "KILLED")]
)
def test_status(folder: RunFolder, runs_dir: Path, status: str, expected: str) -> None:
    _project(folder)
    assert _runs(runs_dir)[0].info.status == "RUNNING"
    _end(folder, status, 3)
    _project(folder)
    assert _runs(runs_dir)[0].info.status == expected


def test_nonfinite_loss_is_shown_as_such(folder: RunFolder, runs_dir: Path) -> None:
    folder.metrics.append({"global_step": 1, "loss/out": math.nan})
    _project(folder)
    assert math.isnan(_runs(runs_dir)[0].data.metrics["loss/out"])


def test_names_that_mlflow_refuses(folder: RunFolder, runs_dir: Path) -> None:
    folder.eval_metrics.append({"global_step": 1, "validation/wiki (de)/nll": 1.0})
    _project(folder)
    assert "validation/wiki _de_/nll" in _runs(runs_dir)[0].data.metrics


def test_more_params_than_one_request_takes(folder: RunFolder, runs_dir: Path) -> None:
    config = {f"key{i}": "x" * 7000 for i in range(230)}
    write_text_atomic(folder.config, yaml.safe_dump(config))
    _project(folder)
    params = _runs(runs_dir)[0].data.params
    assert len(params) == 230
    assert set(map(len, params.values())) == {6000}


# ------------------------------------------------------------------ once, and all of it


def test_projecting_again_adds_nothing(folder: RunFolder, runs_dir: Path) -> None:
    _train(folder, 1, 5)
    folder.eval_metrics.append({"global_step": 5, "validation/all/nll": 2.5})
    _project(folder)
    _project(folder)
    assert _steps(runs_dir, "loss/out") == [1, 2, 3, 4, 5]
    assert _steps(runs_dir, "validation/all/nll") == [5]


def test_a_resumed_run_continues_the_same_mlflow_run(folder: RunFolder, runs_dir: Path) -> None:
    _train(folder, 1, 8)
    folder.eval_metrics.append({"global_step": 8, "validation/all/nll": 2.5})
    _end(folder, "failed", 8)
    _project(folder)
    assert folder.metrics.cut_after(5) == 3
    assert folder.eval_metrics.cut_after(5) == 1
    change = "optim.lr: 0.001 -> 0.01"
    _begin_attempt(folder, 2, 5, (change,))
    write_text_atomic(folder.config, yaml.safe_dump(CONFIG | {"optim": {"lr": 0.01}, "new": 1}))
    _train(folder, 6, 10)
    folder.eval_metrics.append({"global_step": 8, "validation/all/nll": 2.5})
    folder.eval_metrics.append({"global_step": 10, "validation/all/nll": 2.0})
    _end(folder, "done", 10)
    _project(folder)
    (run,) = _runs(runs_dir)
    assert run.info.status == "FINISHED"
    assert _steps(runs_dir, "loss/out") == list(range(1, 11))
    assert _steps(runs_dir, "global_step") == list(range(1, 11))
    assert _steps(runs_dir, "validation/all/nll") == [8, 10]
    assert run.data.params["optim.lr"] == "0.001"
    assert run.data.params["new"] == "1"
    assert run.data.tags["config_change.2"] == change
    assert run.data.tags["attempt"] == "2"


def test_a_follower_sees_a_cut_while_it_runs(folder: RunFolder, runs_dir: Path) -> None:
    _train(folder, 1, 8)
    projection = MlflowProjection(folder, None, EXPERIMENT, "demo")
    projection.interval = 0.05
    running = Follower(folder, [projection])
    running.start()
    deadline = time.monotonic() + 20
    while not (_runs(runs_dir) and "loss/out" in _runs(runs_dir)[0].data.metrics):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    folder.metrics.cut_after(5)
    _begin_attempt(folder, 2, 5)
    _train(folder, 6, 10)
    running.stop()
    assert _steps(runs_dir, "loss/out") == list(range(1, 11))


def test_evaluations_may_come_late(folder: RunFolder, runs_dir: Path) -> None:
    folder.eval_metrics.append({"global_step": 10, "validation/all/nll": 2.0})
    _project(folder)
    folder.eval_metrics.append({"global_step": 10, "task/acc": 0.5})
    folder.eval_metrics.append({"global_step": 5, "validation/all/nll": 3.0})
    _project(folder)
    assert _steps(runs_dir, "validation/all/nll") == [5, 10]
    assert _steps(runs_dir, "task/acc") == [10]


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
    _train(folder, 1, 10)
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
        _project(folder)
    monkeypatch.setattr(MlflowClient, "log_batch", send)
    _project(folder)
    assert _steps(runs_dir, "loss/out") == list(range(1, 11))
    assert _steps(runs_dir, "optim/lr") == list(range(1, 11))
    assert _steps(runs_dir, "validation/all/nll") == [5, 10]


def test_one_folder_in_two_stores(
    folder: RunFolder, runs_dir: Path, store_template: Path, tmp_path: Path
) -> None:
    _train(folder, 1, 3)
    _project(folder)
    other = tmp_path / "other"
    other.mkdir()
    (other / "mlflow.db").write_bytes(store_template.read_bytes())
    _project(folder, f"sqlite:///{other / 'mlflow.db'}")
    assert _steps(runs_dir, "loss/out") == _steps(other, "loss/out") == [1, 2, 3]


def test_two_folders_are_two_runs(folder: RunFolder, runs_dir: Path) -> None:
    _project(folder)
    _project(_new_run(runs_dir / "second", "uid-2"))
    assert len(_runs(runs_dir)) == 2


_LINES = st.lists(st.integers(1, 2300), max_size=8)


@given(lengths=_LINES)
@settings(deadline=None, max_examples=50)
def test_batches_are_whole_lines_in_order(lengths: list[int]) -> None:
    lines = [[Point(f"k{i}", 0.0, 0, step) for i in range(n)] for step, n in enumerate(lengths)]
    made = list(batches(lines))
    assert [p for batch in made for p in batch] == [p for line in lines for p in line]
    assert all(0 < len(batch) <= 1000 for batch in made)
    for step, length in enumerate(lengths):
        if length <= 1000:
            holders = [batch for batch in made if any(p.step == step for p in batch)]
            assert len(holders) == 1


# ------------------------------------------------------------------ trouble


def test_an_unreachable_server_neither_raises_nor_holds_up(
    folder: RunFolder, runs_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _train(folder, 1, 3)
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
    _project(folder)
    assert _steps(runs_dir, "loss/out") == [1, 2, 3]


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
    folders = [_new_run(tmp_path / name, name) for name in ("a", "b", "c")]
    started = [
        subprocess.Popen([sys.executable, "-c", script, str(folder.path)]) for folder in folders
    ]
    assert [process.wait(120) for process in started] == [0, 0, 0]
    assert len(_runs(tmp_path)) == 3
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
        _train(folder, 1, 3)
        _project(folder)
    assert _steps(runs_dir, "loss/out") == [1, 2, 3]
    assert caplog.text.count("no artifacts for now: PermissionError: no bucket") == 1
    _project(folder)
    (run,) = _runs(runs_dir)
    assert "config.yaml" in {a.path for a in _client(runs_dir).list_artifacts(run.info.run_id)}


def test_a_folder_without_its_first_event(runs_dir: Path) -> None:
    folder = RunFolder(runs_dir / "bare")
    folder.create()
    _train(folder, 1, 1)
    with pytest.raises(RuntimeError, match=r"events\.jsonl: does not say when"):
        _project(folder)


def test_default_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    assert tracking_uri(None, "runs/x") == f"sqlite:///{tmp_path}/runs/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://tracker:5000")
    assert tracking_uri(None, "runs/x") == "http://tracker:5000"
    assert tracking_uri("sqlite:////s/m.db", "runs/x") == "sqlite:////s/m.db"


@pytest.mark.parametrize("uri", ["file:///srv/mlruns", "mlruns"])
def test_a_folder_is_no_store(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"^logging\.mlflow\.tracking_uri="):
        tracking_uri(uri, "runs/x")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with pytest.raises(ConfigError, match=r"^MLFLOW_TRACKING_URI="):
        MlflowProjection(RunFolder("runs/x"), None, EXPERIMENT, "x")


def test_artifact_location() -> None:
    assert mlflow_run.artifact_location("sqlite:////a b/mlflow.db") == "file:///a%20b/mlartifacts"
    assert mlflow_run.artifact_location("http://tracker:5000") is None
    assert mlflow_run.artifact_location("postgresql://host/db") is None


def test_metric_entity_takes_a_point_as_it_is() -> None:
    metric = Metric(*Point("k", 1.5, 1000, 7))
    assert (metric.key, metric.value, metric.timestamp, metric.step) == ("k", 1.5, 1000, 7)
