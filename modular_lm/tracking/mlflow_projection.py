"""The MLflow run that mirrors a run's folder: what of its files goes where in MLflow.

A projection: what MLflow holds follows from the files alone, so it may be made late, again, or into
another store, and only what is missing is added (`mlflow_run`). With one exception: MLflow keeps
what it has, so steps that are done again after a resume keep their first values there if those were
sent before the files were cut. Checkpoints are listed by step and path, not uploaded;
`metrics.jsonl` is not either, its numbers are the metrics. Curves of a validation are uploaded as
their file and as a figure.

A folder's event log may hold several `created`, each of a new run that began before any checkpoint
of the one before it: the last is the run that the files tell of. Lines of an earlier one, which lie
in the metrics files until rank 0 cuts them, are older than the last `created`.

Whatever is thrown here (no server, a locked database) is for `follower` to report and try again.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml

from modular_lm import __version__
from modular_lm.config.checks import flatten
from modular_lm.errors import ConfigError
from modular_lm.tracking.figures import position_figure
from modular_lm.tracking.follower import RETRY_SECONDS, one_line
from modular_lm.tracking.mlflow_run import (
    MlflowRun,
    Point,
    as_text,
    find_or_create,
    marked_points_of,
    milliseconds,
    points_of,
)
from modular_lm.tracking.run_folder import RunFolder
from modular_lm.tracking.snapshot import ORIGIN_FILE

log = logging.getLogger(__name__)

_STATUS = {"done": "FINISHED", "failed": "FAILED", "stopped": "KILLED"}


def tracking_uri(config_value: str | None, dump_dir: str | Path) -> str:
    """The store to use: the config's, else MLFLOW_TRACKING_URI, else sqlite beside `dump_dir`.

    Raises ConfigError for a folder of files, which MLflow no longer writes.
    """
    uri = config_value or os.environ.get("MLFLOW_TRACKING_URI")
    if not uri:
        return f"sqlite:///{Path(dump_dir).absolute().parent / 'mlflow.db'}"
    if urlsplit(uri).scheme in ("", "file") and uri != "databricks":
        name = "logging.mlflow.tracking_uri" if config_value else "MLFLOW_TRACKING_URI"
        raise ConfigError(
            f"{name}={uri}: expected the address of a server (http://...) or of a database "
            "(sqlite:////absolute/path/mlflow.db); MLflow does not write plain folders any more"
        )
    return uri


class MlflowProjection:
    """The sink (see `follower.Sink`) that mirrors `folder` in MLflow.

    `uri` as in `tracking_uri`; `tags` beside those that follow from the files. Nothing is contacted
    before the first flush. Raises ConfigError if MLflow is not installed or cannot use the address.
    """

    name = "MLflow"
    interval = 5.0

    def __init__(
        self,
        folder: RunFolder,
        uri: str | None,
        experiment: str,
        run_name: str,
        tags: Mapping[str, str] | None = None,
    ) -> None:
        if importlib.util.find_spec("mlflow") is None:
            raise ConfigError(
                "logging.mlflow.enabled=true: the package mlflow is not installed; "
                "run `pip install mlflow` or set logging.mlflow.enabled=false"
            )
        self.tracking_uri = tracking_uri(uri, folder.path)
        self._folder = folder
        self._experiment = experiment
        self._run_name = run_name
        self._tags = dict(tags or {})
        self._created: dict[str, Any] | None = None
        # The run in the folder began at this time, where another began there before it.
        self._not_older_than = ""
        self._run: MlflowRun | None = None
        self._events: list[dict[str, Any]] = []
        self._training: list[list[Point]] = []
        self._evaluation: list[list[Point]] = []
        self._uploads = _Uploads(folder)

    def event(self, line: dict[str, Any]) -> None:
        """Take one line of the event log."""
        if line["event"] == "created":
            self._begin_run(line)
        self._events.append(line)

    def metrics(self, line: dict[str, Any]) -> None:
        """Take one training line."""
        if line["created_at"] >= self._not_older_than:
            self._training.append(marked_points_of(line))

    def evaluation(self, line: dict[str, Any]) -> None:
        """Take one validation or evaluation line."""
        if line["created_at"] >= self._not_older_than:
            self._evaluation.append(points_of(line))

    def flush(self) -> None:
        """Send what was taken and is not there yet; after an error, ask MLflow what is there."""
        try:
            if self._run is None:
                self._run = self._find_run()
                self._run.set_tags(self._tags)
            self._run.log_training(self._training)
            self._run.log_evaluation(self._evaluation)
            _describe(self._run, self._events, self._folder)
            self._uploads.note(self._events)
            self._uploads.note_evaluations(line[0].step for line in self._evaluation if line)
        except Exception:
            self._run = None
            raise
        finally:
            self._events, self._training, self._evaluation = [], [], []
        self._uploads.send(self._run)

    def close(self) -> None:
        """Upload what could not be uploaded before."""
        if self._run is not None:
            self._uploads.send(self._run, now=True)

    def _begin_run(self, created: dict[str, Any]) -> None:
        """Turn to the run that `created` begins, and forget what is pending of another one."""
        before, self._created = self._created, created
        if before is None or before["uid"] == created["uid"]:
            return
        self._not_older_than = created["time"]
        self._run = None
        self._events, self._training, self._evaluation = [], [], []
        self._uploads = _Uploads(self._folder)

    def _find_run(self) -> MlflowRun:
        if self._created is None:
            raise RuntimeError(f"{self._folder.events_file}: does not say when the run was created")
        uid, began = self._created["uid"], milliseconds(self._created["time"])
        return find_or_create(self.tracking_uri, self._experiment, uid, self._run_name, began)


def _describe(run: MlflowRun, events: Iterable[dict[str, Any]], folder: RunFolder) -> None:
    """Parameters, tags and status, as the events say."""
    tags: dict[str, str] = {}
    status: dict[str, Any] | None = None
    for event in events:
        tags |= _tags(event, folder)
        if event["event"] in ("attempt", "end"):
            status = event
        if event["event"] == "attempt" and folder.config.exists():
            run.log_params(flatten(yaml.safe_load(folder.config.read_text(encoding="utf-8"))))
    run.set_tags(tags)
    if status is None:
        return
    if status["event"] == "attempt":
        run.client.update_run(run.run_id, status="RUNNING")
    else:
        name = _STATUS.get(status["status"], "FAILED")
        run.client.set_terminated(run.run_id, name, milliseconds(status["time"]))


def _tags(event: dict[str, Any], folder: RunFolder) -> dict[str, str]:
    match event["event"]:
        case "attempt":
            attempt = event["attempt"]
            tags = {
                "dump_dir": str(folder.path),
                "modular_lm.version": __version__,
                "status": "running",
                "attempt": str(attempt),
                "world_size": str(event.get("world_size")),
                "hosts": as_text(event.get("hosts")),
            }
            # MLflow keeps the first value of a parameter: this tells of later ones.
            if changes := event.get("config_changes"):
                tags[f"config_change.{attempt}"] = "\n".join(changes)
            return tags | _origin_tags(folder)
        case "created":
            return {"name": str(event.get("name"))}
        case "attempt_end":
            why = f": {event['reason']}" if event["reason"] else ""
            return {f"attempt_end.{event['attempt']}": f"{event['outcome']}{why}"}
        case "checkpoint":
            return {"checkpoint.step": str(event["step"]), "checkpoint.path": str(event["path"])}
        case "end":
            return {"status": event["status"], "end_reason": str(event.get("reason") or "")}
    return {}


def _origin_tags(folder: RunFolder) -> dict[str, str]:
    origin = folder.code / ORIGIN_FILE
    if not origin.exists():
        return {}
    found = json.loads(origin.read_text(encoding="utf-8"))
    if not found["git_commit"]:
        return {}
    return {"mlflow.source.git.commit": found["git_commit"], "git_dirty": as_text(found["dirty"])}


class _Uploads:
    """Files that MLflow gets a copy of. Apart from the points, which must not wait for them."""

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder
        self._code_is_due = False
        self._history_is_due = False
        self._curves_due: set[int] = set()
        self._not_before = 0.0
        self._complained = False

    def note(self, events: Iterable[dict[str, Any]]) -> None:
        """See which files have changed."""
        kinds = {event["event"] for event in events}
        self._code_is_due |= "attempt" in kinds
        self._history_is_due |= bool(kinds & {"attempt", "checkpoint", "end"})

    def note_evaluations(self, steps: Iterable[int]) -> None:
        """See at which steps there may be new curves."""
        self._curves_due |= set(steps)

    def send(self, run: MlflowRun, *, now: bool = False) -> None:
        """Upload what is due; after a failure only some time later, or `now`."""
        if not now and time.monotonic() < self._not_before:
            return
        try:
            if self._code_is_due:
                self._send_code(run)
                self._code_is_due = False
            if self._history_is_due:
                self._send_history(run)
                self._history_is_due = False
            for step in sorted(self._curves_due):
                self._send_curves(run, step)
                self._curves_due.remove(step)
        except Exception as error:
            self._not_before = time.monotonic() + RETRY_SECONDS
            if not self._complained:
                log.warning("MLflow: no artifacts for now: %s", one_line(error))
            self._complained = True

    def _send_code(self, run: MlflowRun) -> None:
        for file in (self._folder.config, self._folder.base_config):
            if file.exists():
                run.client.log_artifact(run.run_id, str(file))
        if self._folder.code.is_dir():
            run.client.log_artifacts(run.run_id, str(self._folder.code), "code")

    def _send_history(self, run: MlflowRun) -> None:
        text = json.dumps(checkpoint_list(self._folder), indent=2)
        run.client.log_text(run.run_id, text, "checkpoints.json")
        run.client.log_artifact(run.run_id, str(self._folder.events_file))

    def _send_curves(self, run: MlflowRun, step: int) -> None:
        """The curves of a step and their figure, unless the file is there already, by its size.

        A step that is done again has other digits, and so nearly always another size.
        """
        file = self._folder.curves_file(step)
        if not file.exists():
            return
        place = str(file.parent.relative_to(self._folder.path))
        there = run.client.list_artifacts(run.run_id, place)
        if (f"{place}/{file.name}", file.stat().st_size) in {(a.path, a.file_size) for a in there}:
            return
        figure = position_figure(json.loads(file.read_text(encoding="utf-8")))
        run.client.log_figure(run.run_id, figure, f"{place}/{file.stem}.png")
        # Last: where this one is, the figure is too.
        run.client.log_artifact(run.run_id, str(file), place)


def checkpoint_list(folder: RunFolder) -> list[dict[str, Any]]:
    """All checkpoints that the run has saved, by step: `{step, path, complete}`.

    Those of the event log, and those that lie there without an event: a crash may have come between
    the two. `complete` is false once a checkpoint has been removed; one at a URI is not looked up.
    """
    events = _events_of_last_run(folder)
    paths = {e["step"]: str(e["path"]) for e in events if e.get("event") == "checkpoint"}
    found = (file.parent for file in folder.checkpoints.glob("*/COMPLETE"))
    paths |= {int(path.name): str(path) for path in found if path.name.isdigit()}
    return [
        {"step": step, "path": path, "complete": "://" in path or Path(path, "COMPLETE").exists()}
        for step, path in sorted(paths.items())
    ]


def _events_of_last_run(folder: RunFolder) -> list[dict[str, Any]]:
    """The events from the last `created` on."""
    events: list[dict[str, Any]] = []
    for event in folder.events():
        if event.get("event") == "created":
            events = []
        events.append(event)
    return events
