"""MLflow ends up with what the files say, each point once, whatever goes wrong on the way."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path

import pytest
import yaml

from modular_lm.errors import ConfigError
from modular_lm.files import write_text_atomic
from modular_lm.tracking import follower, mlflow_run
from modular_lm.tracking.follower import Follower
from modular_lm.tracking.mlflow_projection import MlflowProjection, checkpoint_list, tracking_uri
from modular_lm.tracking.run_folder import RunFolder
from tests.tracking.mlflow_store import (
    CONFIG,
    EXPERIMENT,
    begin_attempt,
    client,
    end,
    new_run,
    points,
    project,
    runs,
    steps,
    train,
)

# ------------------------------------------------------------------ what is there


def test_a_whole_run(folder: RunFolder, runs_dir: Path) -> None:
    train(folder, 1, 5)
    folder.eval_metrics.append({"global_step": 5, "validation/a b/nll": 2.5})
    (folder.code / "modular_lm").mkdir(parents=True)
    (folder.code / "modular_lm" / "x.py").write_text("x = 1\n")
    (folder.code / "snapshot.json").write_text('{"git_commit": "abc", "dirty": true}')
    saved = folder.checkpoints / "0000000005"
    folder.append_event("checkpoint", step=5, path=str(saved), bytes=1, seconds=0.1)
    end(folder, "done", 5)
    project(folder)

    (run,) = runs(runs_dir)
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
    assert steps(runs_dir, "loss/out") == [1, 2, 3, 4, 5]
    assert steps(runs_dir, "validation/a b/nll") == [5]
    assert run.data.metrics["loss/out"] == 1.0


def test_points_keep_the_time_of_their_line(folder: RunFolder, runs_dir: Path) -> None:
    train(folder, 1, 1)
    project(folder)
    (run,) = runs(runs_dir)
    (metric,) = client(runs_dir).get_metric_history(run.info.run_id, "loss/out")
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
    project(folder)
    (run,) = runs(runs_dir)
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
    names = {a.path for a in client(runs_dir).list_artifacts(run.info.run_id)}
    assert "checkpoints.json" in names


@pytest.mark.parametrize(
    ("status", "expected"), [("done", "FINISHED"), ("failed", "FAILED"), ("stopped", "KILLED")]
)
def test_status(folder: RunFolder, runs_dir: Path, status: str, expected: str) -> None:
    project(folder)
    assert runs(runs_dir)[0].info.status == "RUNNING"
    end(folder, status, 3)
    project(folder)
    assert runs(runs_dir)[0].info.status == expected


def test_nonfinite_loss_is_shown_as_such(folder: RunFolder, runs_dir: Path) -> None:
    folder.metrics.append({"global_step": 1, "loss/out": math.nan})
    project(folder)
    assert math.isnan(runs(runs_dir)[0].data.metrics["loss/out"])


def test_names_that_mlflow_refuses(folder: RunFolder, runs_dir: Path) -> None:
    folder.eval_metrics.append({"global_step": 1, "validation/wiki (de)/nll": 1.0})
    project(folder)
    assert "validation/wiki _de_/nll" in runs(runs_dir)[0].data.metrics


def test_more_params_than_one_request_takes(folder: RunFolder, runs_dir: Path) -> None:
    config = {f"key{i}": "x" * 7000 for i in range(230)}
    write_text_atomic(folder.config, yaml.safe_dump(config))
    project(folder)
    params = runs(runs_dir)[0].data.params
    assert len(params) == 230
    assert set(map(len, params.values())) == {6000}


def test_a_checkpoint_whose_event_was_lost_is_listed(folder: RunFolder) -> None:
    for step in (4, 6, 8):
        (folder.checkpoints / f"{step:010d}").mkdir(parents=True)
    for step in (4, 6):
        (folder.checkpoints / f"{step:010d}" / "COMPLETE").touch()
    for step in (2, 4):
        saved = folder.checkpoints / f"{step:010d}"
        folder.append_event("checkpoint", step=step, path=str(saved))
    assert checkpoint_list(folder) == [
        {"step": step, "path": str(folder.checkpoints / f"{step:010d}"), "complete": complete}
        for step, complete in ((2, False), (4, True), (6, True))
    ]


# ------------------------------------------------------------------ once, and all of it


def test_projecting_again_adds_nothing(folder: RunFolder, runs_dir: Path) -> None:
    train(folder, 1, 5)
    folder.eval_metrics.append({"global_step": 5, "validation/all/nll": 2.5})
    project(folder)
    project(folder)
    assert steps(runs_dir, "loss/out") == [1, 2, 3, 4, 5]
    assert steps(runs_dir, "validation/all/nll") == [5]


def test_a_resumed_run_continues_the_same_mlflow_run(folder: RunFolder, runs_dir: Path) -> None:
    train(folder, 1, 8)
    folder.eval_metrics.append({"global_step": 8, "validation/all/nll": 2.5})
    end(folder, "failed", 8)
    project(folder)
    assert folder.metrics.cut_after(5) == 3
    assert folder.eval_metrics.cut_after(5) == 1
    change = "optim.lr: 0.001 -> 0.01"
    begin_attempt(folder, 2, 5, (change,))
    write_text_atomic(folder.config, yaml.safe_dump(CONFIG | {"optim": {"lr": 0.01}, "new": 1}))
    train(folder, 6, 10)
    folder.eval_metrics.append({"global_step": 8, "validation/all/nll": 2.5})
    folder.eval_metrics.append({"global_step": 10, "validation/all/nll": 2.0})
    end(folder, "done", 10)
    project(folder)
    (run,) = runs(runs_dir)
    assert run.info.status == "FINISHED"
    assert steps(runs_dir, "loss/out") == list(range(1, 11))
    assert steps(runs_dir, "global_step") == list(range(1, 11))
    assert steps(runs_dir, "validation/all/nll") == [8, 10]
    assert run.data.params["optim.lr"] == "0.001"
    assert run.data.params["new"] == "1"
    assert run.data.tags["config_change.2"] == change
    assert run.data.tags["attempt"] == "2"


def test_a_follower_sees_a_cut_while_it_runs(folder: RunFolder, runs_dir: Path) -> None:
    train(folder, 1, 8)
    projection = MlflowProjection(folder, None, EXPERIMENT, "demo")
    projection.interval = 0.05
    running = Follower(folder, [projection])
    running.start()
    deadline = time.monotonic() + 20
    while not (runs(runs_dir) and "loss/out" in runs(runs_dir)[0].data.metrics):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    folder.metrics.cut_after(5)
    begin_attempt(folder, 2, 5)
    train(folder, 6, 10)
    running.stop()
    assert steps(runs_dir, "loss/out") == list(range(1, 11))


def _replace_run(folder: RunFolder) -> None:
    """Another run begins in a folder whose run died before its first checkpoint."""
    new_run(folder.path, "uid-2")
    folder.metrics.cut_after(0)
    folder.eval_metrics.cut_after(0)


def test_a_second_created_is_a_second_run(folder: RunFolder, runs_dir: Path) -> None:
    train(folder, 1, 5)
    folder.append_event("checkpoint", step=5, path=str(folder.checkpoints / "0000000005"))
    end(folder, "failed", 5)
    project(folder)
    _replace_run(folder)
    train(folder, 1, 3, loss=7.0)
    folder.eval_metrics.append({"global_step": 3, "validation/all/nll": 2.0})
    end(folder, "done", 3)
    project(folder)
    project(folder)
    assert points(runs_dir, "loss/out", "uid-1") == {s: [5 / s] for s in range(1, 6)}
    assert points(runs_dir, "loss/out", "uid-2") == {s: [7 / s] for s in range(1, 4)}
    assert steps(runs_dir, "validation/all/nll", "uid-2") == [3]
    assert {r.data.tags["modular_lm.uid"]: r.info.status for r in runs(runs_dir)} == {
        "uid-1": "FAILED",
        "uid-2": "FINISHED",
    }
    assert checkpoint_list(folder) == []


@pytest.mark.parametrize("lines_per_flush", [3, 500])
def test_a_follower_that_comes_before_the_cut(
    folder: RunFolder, runs_dir: Path, monkeypatch: pytest.MonkeyPatch, lines_per_flush: int
) -> None:
    """The lines of the first run, which nobody has mirrored, are there until rank 0 cuts them."""
    monkeypatch.setattr(follower, "_LINES_PER_FLUSH", lines_per_flush)
    train(folder, 1, 8)
    folder.eval_metrics.append({"global_step": 8, "validation/all/nll": 2.5})
    new_run(folder.path, "uid-2")
    projection = MlflowProjection(folder, None, EXPERIMENT, "demo")
    projection.interval = 0.05
    running = Follower(folder, [projection])
    running.start()
    deadline = time.monotonic() + 20
    while not any(r.data.tags["modular_lm.uid"] == "uid-2" for r in runs(runs_dir)):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(0.5)
    folder.metrics.cut_after(0)
    folder.eval_metrics.cut_after(0)
    train(folder, 1, 3, loss=7.0)
    running.stop()
    assert points(runs_dir, "loss/out", "uid-2") == {s: [7 / s] for s in range(1, 4)}
    assert steps(runs_dir, "validation/all/nll", "uid-2") == []


def test_evaluations_may_come_late(folder: RunFolder, runs_dir: Path) -> None:
    folder.eval_metrics.append({"global_step": 10, "validation/all/nll": 2.0})
    project(folder)
    folder.eval_metrics.append({"global_step": 10, "task/acc": 0.5})
    folder.eval_metrics.append({"global_step": 5, "validation/all/nll": 3.0})
    project(folder)
    assert steps(runs_dir, "validation/all/nll") == [5, 10]
    assert steps(runs_dir, "task/acc") == [10]


def test_one_folder_in_two_stores(
    folder: RunFolder, runs_dir: Path, store_template: Path, tmp_path: Path
) -> None:
    train(folder, 1, 3)
    project(folder)
    other = tmp_path / "other"
    other.mkdir()
    (other / "mlflow.db").write_bytes(store_template.read_bytes())
    project(folder, f"sqlite:///{other / 'mlflow.db'}")
    assert steps(runs_dir, "loss/out") == steps(other, "loss/out") == [1, 2, 3]


def test_two_folders_are_two_runs(folder: RunFolder, runs_dir: Path) -> None:
    project(folder)
    project(new_run(runs_dir / "second", "uid-2"))
    assert len(runs(runs_dir)) == 2


# ------------------------------------------------------------------ which store


def test_a_folder_without_its_first_event(runs_dir: Path) -> None:
    folder = RunFolder(runs_dir / "bare")
    folder.create()
    train(folder, 1, 1)
    with pytest.raises(RuntimeError, match=r"events\.jsonl: does not say when"):
        project(folder)


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
