"""The MLflow run of a sweep, and its trials' runs below it, whenever MLflow is there."""

from __future__ import annotations

from pathlib import Path

import pytest

from modular_lm.tracking.mlflow_projection import MlflowProjection
from modular_lm.tracking.mlflow_sweep import MlflowSweep
from tests.tracking.mlflow_store import begin_attempt, client, end, new_run, runs

AWAY = "http://127.0.0.1:9"


def trial(sweep: MlflowSweep, path: Path, uid: str) -> None:
    """A trial's run, mirrored to its end with the tags that the sweep gives."""
    folder = new_run(path, uid)
    begin_attempt(folder, 1, 0)
    end(folder, "done", 40)
    mirror = MlflowProjection(folder, None, "modular-lm", uid, sweep.tags_of_trials())
    for event in folder.events():
        mirror.event(event)
    mirror.flush()


def parents(runs_dir: Path) -> dict[str, str | None]:
    tags = {run.info.run_name: run.data.tags for run in runs(runs_dir)}
    return {str(name): each.get("mlflow.parentRunId") for name, each in tags.items()}


def test_trials_lie_below_the_sweep(runs_dir: Path) -> None:
    sweep = MlflowSweep(runs_dir / "s", None, "modular-lm", "s")
    sweep.begin({"sweep.seeds": [0]})
    trial(sweep, runs_dir / "a", "a")
    (own,) = [run for run in runs(runs_dir) if run.info.run_name == "s"]
    assert parents(runs_dir) == {"s": None, "a": own.info.run_id}
    sweep.finish("FINISHED", {}, [])
    assert client(runs_dir).get_run(own.info.run_id).info.status == "FINISHED"


def test_the_next_command_puts_trials_below_a_run_that_could_not_be_made(
    runs_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    away = MlflowSweep(runs_dir / "s", AWAY, "modular-lm", "s")
    away.begin({})
    assert "no run for the sweep itself" in caplog.text
    # It was back when this one began.
    trial(away, runs_dir / "a", "a")
    other = MlflowSweep(runs_dir / "other", None, "modular-lm", "s")
    trial(other, runs_dir / "b", "b")
    assert parents(runs_dir) == {"a": None, "b": None}
    MlflowSweep(runs_dir / "s", None, "modular-lm", "s").finish("FINISHED", {}, [])
    (own,) = [run for run in runs(runs_dir) if run.info.run_name == "s"]
    assert parents(runs_dir) == {"s": None, "a": own.info.run_id, "b": None}
