"""The MLflow run of a sweep: the parent of its trials' runs, with the report at the end.

As with runs (`mlflow_projection`) MLflow only mirrors what the folder holds: without it the sweep
goes on, and the next command makes the run and puts below it what trials there are. A trial that
trained to its end without MLflow gets its run when its own command is given again (`ray_jobs.train`
with the `config.yaml` of its folder).
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from modular_lm.files import write_text_atomic
from modular_lm.tracking.follower import one_line
from modular_lm.tracking.mlflow_projection import tracking_uri
from modular_lm.tracking.mlflow_run import MlflowRun, find_or_create, milliseconds

log = logging.getLogger(__name__)

_PARENT_TAG = "mlflow.parentRunId"
# Of the trials' runs: whose they are. Known without MLflow, which makes up the parent's id.
_SWEEP_TAG = "sweep.uid"


class MlflowSweep:
    """The parent run of the sweep in `path`. `uri` as in `tracking_uri`, which may raise."""

    def __init__(self, path: Path, uri: str | None, experiment: str, name: str) -> None:
        self.tracking_uri = tracking_uri(uri, path)
        self.experiment = experiment
        self._path, self._name = path, name
        self._parent: str | None = None

    def tags_of_trials(self) -> dict[str, str]:
        """What puts a trial's run below the sweep's: at once, or later if MLflow is away now."""
        parent = {} if self._parent is None else {_PARENT_TAG: self._parent}
        return {_SWEEP_TAG: self._uid()[1], **parent}

    def begin(self, params: Mapping[str, Any]) -> None:
        """Find or create the run, unless MLflow is away."""
        try:
            run = self._run()
            run.log_params(params)
            run.set_tags({"dump_dir": str(self._path), "status": "running"})
            run.client.update_run(run.run_id, status="RUNNING")
            self._parent = run.run_id
        except Exception as error:
            log.warning("MLflow: no run for the sweep itself: %s", one_line(error))

    def finish(self, status: str, tags: Mapping[str, str], files: Iterable[Path]) -> None:
        """Say how the sweep stands, replace its report, and have all its trials' runs below it.

        status: as MLflow calls it.
        """
        try:
            run = self._run()
            self._adopt(run)
            run.set_tags({**tags, "status": status.lower()})
            for file in files:
                place = str(file.parent.relative_to(self._path))
                run.client.log_artifact(run.run_id, str(file), None if place == "." else place)
            now = milliseconds(datetime.now(UTC).isoformat())
            run.client.set_terminated(run.run_id, status, now)
        except Exception as error:
            log.warning("MLflow: the sweep's run lacks its end: %s", one_line(error))

    def _adopt(self, run: MlflowRun) -> None:
        """Put below it what trials have made while it was not there."""
        where = [run.experiment_id], f"tags.`{_SWEEP_TAG}` = '{self._uid()[1]}'"
        token = None
        while True:
            found = run.client.search_runs(*where, page_token=token)
            for child in found:
                if child.data.tags.get(_PARENT_TAG) != run.run_id:
                    run.client.set_tag(child.info.run_id, _PARENT_TAG, run.run_id)
            token = found.token
            if not token:
                return

    def _uid(self) -> tuple[str, str]:
        """When the sweep was first mirrored, and as what."""
        file = self._path / "ray" / "mlflow_uid"
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            write_text_atomic(file, f"{datetime.now(UTC).isoformat()} {uuid.uuid4().hex}\n")
        began, uid = file.read_text(encoding="utf-8").split()
        return began, uid

    def _run(self) -> MlflowRun:
        began, uid = self._uid()
        return find_or_create(
            self.tracking_uri, self.experiment, uid, self._name, milliseconds(began)
        )
