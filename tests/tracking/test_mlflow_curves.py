"""Curves of the loss reach MLflow as a figure and a file: all of them, the newest, once each."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from mlflow import MlflowClient

from modular_lm.tracking import mlflow_projection
from modular_lm.tracking.follower import replay
from modular_lm.tracking.mlflow_projection import MlflowProjection
from modular_lm.tracking.run_folder import RunFolder
from tests.tracking.mlflow_store import (
    EXPERIMENT,
    artifacts,
    begin_attempt,
    new_run,
    project,
    train,
    validate,
)


@pytest.fixture
def uploads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of all figures and curve files that are uploaded, in their order."""
    found: list[str] = []
    upload = MlflowClient.log_artifact

    def noted(client: MlflowClient, run_id: str, path: str, place: str | None = None) -> None:
        if place is not None:
            found.append(f"{place}/{Path(path).name}")
        upload(client, run_id, path, place)

    monkeypatch.setattr(MlflowClient, "log_artifact", noted)
    return found


def names(*steps: int) -> list[str]:
    return [f"evals/{step:010d}/positions.{kind}" for step in steps for kind in ("png", "json")]


def test_each_step_has_a_figure_and_the_file(
    folder: RunFolder, runs_dir: Path, uploads: list[str]
) -> None:
    train(folder, 1, 10)
    validate(folder, 5)
    validate(folder, 10)
    project(folder)
    assert uploads == names(5, 10)
    for step in (5, 10):
        there = artifacts(runs_dir) / "evals" / f"{step:010d}"
        assert {path.name for path in there.iterdir()} == {"positions.json", "positions.png"}
        assert (there / "positions.json").read_bytes() == folder.curves_file(step).read_bytes()
        assert (there / "positions.png").read_bytes().startswith(b"\x89PNG")


def test_a_validation_without_curves(folder: RunFolder, uploads: list[str]) -> None:
    folder.eval_metrics.append({"global_step": 5, "validation/all/nll": 2.5})
    folder.eval_metrics.append({"global_step": 6})
    project(folder)
    assert uploads == []


def test_what_is_there_is_not_sent_again(folder: RunFolder, uploads: list[str]) -> None:
    validate(folder, 5)
    project(folder)
    validate(folder, 10)
    project(folder)
    project(folder)
    assert uploads == names(5, 10)


def test_a_step_done_again_after_a_resume_is_replaced(
    folder: RunFolder, runs_dir: Path, uploads: list[str]
) -> None:
    for step in (5, 10):
        validate(folder, step)
    project(folder)
    folder.eval_metrics.cut_after(5)
    begin_attempt(folder, 2, 5)
    validate(folder, 10, nll=2.125)
    project(folder)
    assert uploads == names(5, 10, 10)
    there = artifacts(runs_dir) / "evals"
    assert sorted(path.name for path in there.iterdir()) == ["0000000005", "0000000010"]
    found = json.loads((there / "0000000010" / "positions.json").read_text())
    assert found["sources"]["all"]["chunk_index"]["nll"] == [2.625, 1.625]


def test_another_run_in_the_folder_leaves_the_curves_of_the_first(
    folder: RunFolder, runs_dir: Path
) -> None:
    validate(folder, 5)
    validate(folder, 10)
    project(folder)
    new_run(folder.path, "uid-2")
    folder.eval_metrics.cut_after(0)
    validate(folder, 5, nll=7.125)
    project(folder)
    assert len(list((artifacts(runs_dir) / "evals").iterdir())) == 2
    (second,) = (artifacts(runs_dir, "uid-2") / "evals").iterdir()
    assert (second.name, "7.625" in (second / "positions.json").read_text()) == ("0000000005", True)


def test_a_store_that_was_away_gets_them_later(
    folder: RunFolder,
    runs_dir: Path,
    uploads: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    upload, calls = MlflowClient.log_artifact, 0

    def unreliable(client: MlflowClient, run_id: str, path: str, place: str | None = None) -> None:
        nonlocal calls
        calls += place is not None
        # The first figure arrives, its file does not.
        if calls > 1:
            raise ConnectionError("no bucket")
        upload(client, run_id, path, place)

    for step in (5, 10):
        validate(folder, step)
    monkeypatch.setattr(mlflow_projection, "RETRY_SECONDS", 0.0)
    projection = MlflowProjection(folder, None, EXPERIMENT, "demo")
    with monkeypatch.context() as patched:
        patched.setattr(MlflowClient, "log_artifact", unreliable)
        replay(folder, projection)
    assert uploads == names(5)[:1]
    uploads.clear()
    projection.close()
    assert uploads == names(5, 10)
    assert len(list((artifacts(runs_dir) / "evals").rglob("*.*"))) == 4
