"""One run in an MLflow store: found by its tag or created, and added to without duplicates.

Which points are there already, MLflow itself knows:

- training lines come in the order of their steps, so the metric `global_step`, sent in the same
  batch as the line it belongs to, is a high-water mark that cannot disagree with the points;
- evaluations may come late and in any order, but are few: their points are looked up.

A point keeps the time at which its line was written, so a batch that is sent twice because the
answer got lost changes nothing. One process at a time adds to a run.

Everything here may raise what MLflow raises; then nothing that an `MlflowRun` remembers is to be
trusted, and the next try begins with `find_or_create`. MLflow is imported on first use.
"""

from __future__ import annotations

import contextlib
import getpass
import json
import logging
import os
import re
import shutil
import uuid
from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from modular_lm.tracking.run_folder import metric_values

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

UID_TAG = "modular_lm.uid"
MARK = "global_step"
_METRICS_PER_BATCH = 1000
_LONGEST_KEY = 250
_LONGEST_PARAM = 6000
_LONGEST_TAG = 5000
# Unless the user chose otherwise. A server that hangs may cost about 15 s when a run ends: MLflow's
# own defaults (120 s, 7 retries) would hold it for minutes.
_ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "6",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
}


class Point(NamedTuple):
    """One value of one metric; `timestamp` in milliseconds since 1970."""

    key: str
    value: float
    timestamp: int
    step: int


def points_of(line: Mapping[str, Any]) -> list[Point]:
    """The points of a line of `metrics.jsonl` or `metrics.eval.jsonl`."""
    step, timestamp = line["global_step"], milliseconds(line["created_at"])
    return [Point(mlflow_key(k), v, timestamp, step) for k, v in metric_values(line).items()]


def marked_points_of(line: Mapping[str, Any]) -> list[Point]:
    """The points of a training line, the mark last: it is there only if all others are."""
    step, timestamp = line["global_step"], milliseconds(line["created_at"])
    return [*points_of(line), Point(MARK, step, timestamp, step)]


class MlflowRun:
    """One run in a store, and what is known to be in it."""

    def __init__(self, client: MlflowClient, run: Run) -> None:
        self.client = client
        self.run_id: str = run.info.run_id
        self.experiment_id: str = run.info.experiment_id
        self._mark = run.data.metrics.get(MARK, -1)
        self._params = set(run.data.params)
        self._metrics = set(run.data.metrics)
        self._steps_of: dict[str, set[int]] = {}

    def log_training(self, lines: Iterable[list[Point]]) -> None:
        """Send those lines (of `marked_points_of`) whose steps are beyond the mark."""
        new, mark = [], self._mark
        for line in lines:
            if line[-1].step > mark:
                new.append(line)
                mark = line[-1].step
        self._send(new)
        self._mark = mark

    def log_evaluation(self, lines: Iterable[list[Point]]) -> None:
        """Send the points of metrics at steps at which they have none yet."""
        new = []
        for line in lines:
            fresh = [point for point in line if point.step not in self._steps(point.key)]
            for point in fresh:
                self._steps(point.key).add(point.step)
            new.append(fresh)
        self._send(new)

    def log_params(self, values: Mapping[str, Any]) -> None:
        """Add parameters that are not there yet: MLflow refuses to change one."""
        from mlflow.entities import Param

        named = {mlflow_key(key): value for key, value in values.items()}
        new = {key: value for key, value in named.items() if key not in self._params}
        params = [Param(key, as_text(value)[:_LONGEST_PARAM]) for key, value in new.items()]
        self.client.log_batch(self.run_id, params=params, synchronous=True)
        self._params |= new.keys()

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Set tags, replacing those there are."""
        from mlflow.entities import RunTag

        cut = [RunTag(mlflow_key(key), text[:_LONGEST_TAG]) for key, text in tags.items()]
        self.client.log_batch(self.run_id, tags=cut, synchronous=True)

    def _steps(self, key: str) -> set[int]:
        if key not in self._steps_of:
            known = key in self._metrics
            history = self.client.get_metric_history(self.run_id, key) if known else ()
            self._steps_of[key] = {metric.step for metric in history}
        return self._steps_of[key]

    def _send(self, lines: Iterable[list[Point]]) -> None:
        from mlflow.entities import Metric

        for batch in batches(lines):
            metrics = [Metric(*point) for point in batch]
            self.client.log_batch(self.run_id, metrics=metrics, synchronous=True)


def find_or_create(uri: str, experiment: str, uid: str, run_name: str, created: int) -> MlflowRun:
    """The run with the tag `modular_lm.uid` = `uid`, else a new one that began at `created`."""
    client = _client(uri)
    experiment_id = _experiment_id(client, experiment, uri)
    found = client.search_runs([experiment_id], f"tags.`{UID_TAG}` = '{uid}'", max_results=1)
    if found:
        return MlflowRun(client, found[0])
    tags = {UID_TAG: uid, "mlflow.source.name": "modular_lm"}
    # A container may run under an id that has no name.
    with contextlib.suppress(KeyError, OSError):
        tags["mlflow.user"] = getpass.getuser()
    return MlflowRun(client, client.create_run(experiment_id, created, tags, run_name))


def artifact_location(uri: str) -> str | None:
    """Where artifacts go: `mlartifacts` beside a sqlite file; elsewhere the store decides (None).

    MLflow's own choice for sqlite is relative to the current folder.
    """
    database = _sqlite_file(uri)
    return None if database is None else (database.parent / "mlartifacts").as_uri()


def batches(lines: Iterable[list[Point]]) -> Iterator[list[Point]]:
    """Batches that MLflow takes as one transaction: whole lines, unless one line is longer."""
    batch: list[Point] = []
    for line in lines:
        if batch and len(batch) + len(line) > _METRICS_PER_BATCH:
            yield batch
            batch = []
        batch.extend(line)
        while len(batch) > _METRICS_PER_BATCH:
            yield batch[:_METRICS_PER_BATCH]
            batch = batch[_METRICS_PER_BATCH:]
    if batch:
        yield batch


def mlflow_key(key: str) -> str:
    """A name with only the characters that MLflow accepts, and no more of them."""
    return re.sub(r"[^\w\-. :/]", "_", key, flags=re.ASCII)[:_LONGEST_KEY]


def as_text(value: Any) -> str:
    """A config value as MLflow shows it."""
    return value if isinstance(value, str) else json.dumps(value)


def milliseconds(time: str) -> int:
    """An ISO 8601 time in milliseconds since 1970."""
    return int(datetime.fromisoformat(time).timestamp() * 1000)


def _client(uri: str) -> MlflowClient:
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from mlflow import MlflowClient

    # Creating the tables of a new sqlite file would report every migration.
    logging.getLogger("mlflow").setLevel(logging.WARNING)
    database = _sqlite_file(uri)
    if database is not None and not database.exists():
        _create_sqlite(database)
    return MlflowClient(tracking_uri=uri)


def _sqlite_file(uri: str) -> Path | None:
    if not uri.startswith("sqlite:///"):
        return None
    return Path(uri.removeprefix("sqlite:///").partition("?")[0]).absolute()


def _create_sqlite(database: Path) -> None:
    """Make the tables in another file, then give it the name, unless someone else was faster.

    MLflow makes them by some sixty migrations, outside of any transaction: two processes that begin
    at once, or one that is killed in between, would leave a file that no MLflow opens again.
    """
    from mlflow import MlflowClient

    database.parent.mkdir(parents=True, exist_ok=True)
    draft = database.with_name(f".{database.name}.{uuid.uuid4().hex[:8]}")
    copy = draft.with_name(f"{draft.name}.copy")
    try:
        MlflowClient(tracking_uri=f"sqlite:///{draft}")
        # A copy, because MLflow keeps its connection to the draft.
        shutil.copyfile(draft, copy)
        with contextlib.suppress(FileExistsError):
            os.link(copy, database)
    finally:
        draft.unlink(missing_ok=True)
        copy.unlink(missing_ok=True)


def _experiment_id(client: MlflowClient, name: str, uri: str) -> str:
    from mlflow.exceptions import MlflowException

    if (found := client.get_experiment_by_name(name)) is not None:
        return found.experiment_id
    try:
        return client.create_experiment(name, artifact_location(uri))
    except MlflowException:
        # Another run may have created it just now.
        if (found := client.get_experiment_by_name(name)) is None:
            raise
        return found.experiment_id
