"""Runs as their files, projected into a sqlite store, and what the store then holds."""

from __future__ import annotations

import json
from pathlib import Path

import yaml
from mlflow import MlflowClient
from mlflow.entities import Run

from modular_lm.files import write_text_atomic
from modular_lm.tracking.follower import replay
from modular_lm.tracking.mlflow_projection import MlflowProjection
from modular_lm.tracking.mlflow_run import UID_TAG
from modular_lm.tracking.run_folder import RunFolder

EXPERIMENT = "modular-lm"
CONFIG = {"name": "demo", "optim": {"lr": 0.001}, "data": {"sources": {"a b": 1.0}}, "none": None}


def new_run(path: Path, uid: str = "uid-1") -> RunFolder:
    """Begin a run in `path`, which may hold an earlier one."""
    folder = RunFolder(path)
    folder.create()
    write_text_atomic(folder.config, yaml.safe_dump(CONFIG))
    write_text_atomic(folder.base_config, "name: demo\n")
    folder.append_event("created", uid=uid, name="demo", global_batch_size=8)
    begin_attempt(folder, 1, 0)
    return folder


def begin_attempt(folder: RunFolder, attempt: int, step: int, changes: tuple = ()) -> None:
    folder.append_event(
        "attempt",
        attempt=attempt,
        start_step=step,
        world_size=2,
        hosts=["n0", "n1"],
        config_changes=list(changes),
    )


def train(folder: RunFolder, first: int, last: int, loss: float = 5.0) -> None:
    """Write the lines of the steps first..last, their loss `loss / step`."""
    for step in range(first, last + 1):
        folder.metrics.append({"global_step": step, "loss/out": loss / step, "optim/lr": 1e-3})


def validate(folder: RunFolder, step: int, nll: float = 2.5) -> None:
    """Write the line and the curves of a validation, of chunks of two tokens."""
    by_position = {"nll": [nll + 0.5, nll - 0.5], "count": [4, 4]}
    names = ("position_in_chunk", "position_in_first_chunk", "position_in_later_chunks")
    curves = dict.fromkeys(names, by_position) | {"chunk_index": by_position}
    report = {"step": step, "chunk_len": 2, "sources": {"all": curves}}
    folder.evaluation(step).mkdir(parents=True, exist_ok=True)
    write_text_atomic(folder.curves_file(step), json.dumps(report))
    folder.eval_metrics.append({"global_step": step, "validation/all/nll": nll})


def end(folder: RunFolder, status: str, step: int) -> None:
    folder.append_event("end", status=status, step=step, exit_code=0, reason="because")


def project(folder: RunFolder, uri: str | None = None) -> MlflowProjection:
    projection = MlflowProjection(folder, uri, EXPERIMENT, "demo")
    replay(folder, projection)
    return projection


def client(runs_dir: Path) -> MlflowClient:
    return MlflowClient(tracking_uri=f"sqlite:///{runs_dir / 'mlflow.db'}")


def runs(runs_dir: Path) -> list[Run]:
    """All runs of the experiment in the store of `runs_dir`."""
    store = client(runs_dir)
    experiment = store.get_experiment_by_name(EXPERIMENT)
    return list(store.search_runs([experiment.experiment_id])) if experiment else []


def artifacts(runs_dir: Path, uid: str = "uid-1") -> Path:
    """The folder of a run's artifacts."""
    (run,) = (run for run in runs(runs_dir) if run.data.tags[UID_TAG] == uid)
    return runs_dir / "mlartifacts" / run.info.run_id / "artifacts"


def points(runs_dir: Path, key: str, uid: str = "uid-1") -> dict[int, list[float]]:
    """The values of a metric of one run, by step."""
    (run,) = (run for run in runs(runs_dir) if run.data.tags[UID_TAG] == uid)
    found: dict[int, list[float]] = {}
    for metric in client(runs_dir).get_metric_history(run.info.run_id, key):
        found.setdefault(metric.step, []).append(metric.value)
    return found


def steps(runs_dir: Path, key: str, uid: str = "uid-1") -> list[int]:
    """The steps of all points of a metric of one run, ascending."""
    found = points(runs_dir, key, uid)
    return sorted(step for step, values in found.items() for _ in values)
