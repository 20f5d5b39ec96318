"""An MLflow store without the seconds that its tables take."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from modular_lm.tracking.mlflow_run import find_or_create
from modular_lm.tracking.run_folder import RunFolder
from tests.tracking.mlflow_store import new_run


@pytest.fixture(scope="session")
def store_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MLflow sqlite file with one unrelated run; copy it before use."""
    database = tmp_path_factory.mktemp("mlflow_template") / "template.db"
    find_or_create(f"sqlite:///{database}", "elsewhere", "other", "other", 0)
    return database


@pytest.fixture
def runs_dir(tmp_path: Path, store_template: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for runs with the default MLflow store in it, and no other store configured."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    runs = tmp_path / "my runs"
    runs.mkdir()
    shutil.copyfile(store_template, runs / "mlflow.db")
    return runs


@pytest.fixture
def folder(runs_dir: Path) -> RunFolder:
    """A run that has just begun, in a folder of `runs_dir`."""
    return new_run(runs_dir / "demo")
