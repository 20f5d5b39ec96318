"""A trial of a sweep, in the process that Ray Tune starts for it: a training run like any other.

It reports each validation to Tune, whose scheduler may have it stopped, by the same request in its
folder by which a user stops a run: so it saves, and its workers are gone when it ends.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ray import tune

from modular_lm.cli import setup_logging
from modular_lm.errors import EXIT_BAD_INPUT, EXIT_DONE, DivergedError, UserFacingError, reason
from modular_lm.files import Locked, lock
from modular_lm.sweep.results import validation_loss
from modular_lm.tracking.follower import Sink
from modular_lm.tracking.mlflow_projection import MlflowProjection
from modular_lm.tracking.run_folder import RunFolder
from modular_lm.train.driver import drive
from modular_lm.train.run import Run
from ray_jobs._attempts import run_attempts

log = logging.getLogger(__name__)

# Processes of a driver that was killed end within seconds.
_PATIENCE_S = 60


@dataclass(frozen=True)
class Mirror:
    """Where a trial is shown in MLflow."""

    uri: str
    experiment: str
    tags: dict[str, str]


@dataclass(frozen=True)
class Job:
    """What the process of a trial is given.

    per_step: of each axis that a scheduler may compare at; sweep: where a stop is asked for
    """

    run: Run
    given: dict[str, Any]
    per_step: dict[str, float]
    sweep: RunFolder
    mirror: Mirror | None


def train_trial(job: Job) -> dict[str, Any]:
    """Train to the end; returns {"outcome": done | stopped | failed, "why"}, of a failure that
    another attempt would meet, too, with "is_final": True.
    """
    run, folder = job.run, job.run.folder
    if asked := job.sweep.stop_requested():
        return {"outcome": "stopped", "why": asked}
    setup_logging(None, folder.logs / "driver.log")
    sinks: list[Sink] = [ToTune(job.per_step)]
    if m := job.mirror:
        sinks.append(MlflowProjection(folder, m.uri, m.experiment, run.config.name, m.tags))
    try:
        _wait_for_others(folder)
        code = drive(run, job.given, lambda: run_attempts(run), sinks)
    except UserFacingError as error:
        is_final = error.exit_code == EXIT_BAD_INPUT or isinstance(error, DivergedError)
        return {"outcome": "failed", "why": str(error), "is_final": is_final}
    except Exception as error:
        log.exception("trial %s", run.config.name)
        return {"outcome": "failed", "why": reason(error)}
    why = (folder.last_event("end") or {}).get("reason")
    return {"outcome": "done" if code == EXIT_DONE else "stopped", "why": why}


class ToTune:
    """The sink that reports validation losses to Tune, by step and by what was spent."""

    name = "Tune"
    interval = 1.0

    def __init__(self, per_step: Mapping[str, float]) -> None:
        self._per_step = dict(per_step)
        self._found: list[dict[str, Any]] = []

    def event(self, line: dict[str, Any]) -> None:
        """Take one line of the event log."""

    def metrics(self, line: dict[str, Any]) -> None:
        """Take one training line."""

    def evaluation(self, line: dict[str, Any]) -> None:
        """Take one validation or evaluation line."""
        if (point := result_of(line, self._per_step)) is not None:
            self._found.append(point)

    def flush(self) -> None:
        """Report what was taken."""
        found, self._found = self._found, []
        for point in found:
            tune.report(point)

    def close(self) -> None:
        """Nothing is left to do."""


def result_of(line: Mapping[str, Any], per_step: Mapping[str, float]) -> dict[str, Any] | None:
    """What Tune is told of a line of `metrics.eval.jsonl`; None if it has no validation loss."""
    loss, step = validation_loss(line), line["global_step"]
    if loss is None:
        return None
    spent = {axis: step * amount for axis, amount in per_step.items()}
    return {"loss": loss if math.isfinite(loss) else math.inf, "step": step, **spent}


def _wait_for_others(folder: RunFolder) -> None:
    deadline = time.monotonic() + _PATIENCE_S
    while time.monotonic() < deadline:
        try:
            with lock(folder.ray / "driver.lock", blocking=False):
                return
        except Locked:
            time.sleep(0.5)
