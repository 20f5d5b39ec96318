"""The two lines that every attempt of a run has in its event log: `attempt` and `attempt_end`.

The first is written by `Run.begin_attempt`, the second here, once, by whoever knows how it ended.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from modular_lm.tracking.run_folder import RunFolder


def open_attempt(folder: RunFolder) -> dict[str, Any] | None:
    """The event of the attempt that has begun and not ended, if there is one."""
    latest, ended = folder.last_event("attempt"), folder.last_event("attempt_end")
    return None if latest and ended and ended["attempt"] == latest["attempt"] else latest


def end_attempt(folder: RunFolder, outcome: str, reason: str | None) -> None:
    """Record how the attempt that is under way ended; nothing if none is."""
    began = open_attempt(folder)
    if began is None:
        return
    step = max(folder.last_step.read(), began["start_step"])
    end = _last_sign_of_life(folder) if outcome == "lost" else datetime.now(UTC)
    seconds = (end - datetime.fromisoformat(began["time"])).total_seconds()
    folder.append_event(
        "attempt_end",
        attempt=began["attempt"],
        outcome=outcome,
        reason=reason,
        step=step,
        steps=step - began["start_step"],
        seconds=round(max(0.0, seconds), 3),
        world_size=began["world_size"],
        hosts=began["hosts"],
    )
    folder.clear_stuck()


def _last_sign_of_life(folder: RunFolder) -> datetime:
    files = (folder.ray / "last_step", folder.metrics.path, folder.events_file)
    return datetime.fromtimestamp(max(f.stat().st_mtime for f in files if f.exists()), UTC)
