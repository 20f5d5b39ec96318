"""The event log of a run on Ray: written by the controller, which runs beside the driver."""

from __future__ import annotations

from typing import Any

from ray.train import Checkpoint, UserCallback

from modular_lm.tracking.run_folder import RunFolder


class EventRecorder(UserCallback):
    """Appends what workers report to the run's event log."""

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder

    def after_report(
        self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Checkpoint | None
    ) -> None:
        """All ranks report the same; one line is written."""
        fields = dict(metrics[0])
        self._folder.append_event(fields.pop("event"), **fields)
