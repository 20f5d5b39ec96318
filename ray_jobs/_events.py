"""The event log of a run on Ray: written by the controller, which runs beside the driver."""

from __future__ import annotations

from typing import Any

from ray.train import Checkpoint, UserCallback

from modular_lm.tracking.run_folder import RunFolder
from ray_jobs._failures import explain


class EventRecorder(UserCallback):
    """Appends what workers report, and how they crash, to the run's event log."""

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder

    def after_report(
        self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Checkpoint | None
    ) -> None:
        """All ranks report the same; one line is written."""
        fields = dict(metrics[0])
        self._folder.append_event(fields.pop("event"), **fields)

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Ray starts the workers again after this, or gives up."""
        attempt = (self._folder.last_event("attempt") or {}).get("attempt")
        message, code = explain(_Failures(worker_exceptions))
        self._folder.append_event(
            "failure",
            attempt=attempt,
            ranks=sorted(worker_exceptions),
            reason=message,
            exit_code=code,
        )


class _Failures(Exception):
    def __init__(self, worker_failures: dict[int, Exception]) -> None:
        super().__init__()
        self.worker_failures = worker_failures
