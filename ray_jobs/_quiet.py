"""What reaches the terminal of what Ray's processes print.

What training workers and the cluster's autoscaler say does. What Ray Train's own actors say does
not: it is whole tracebacks of calls that they then repeat, and a real failure comes back as an
exception. All of it stays in the logs of Ray's session. Reaches into Ray, which has no setting for
it.
"""

from __future__ import annotations

from typing import Any

_ACTORS = ("TrainController", "PlacementGroupCleaner")
# Many small trials at once are no mistake.
_LINES = ("worker processes have been started on node",)


def quieten() -> None:
    """Before `ray.init`: have the driver leave those lines out."""
    import ray._private.worker as ray_worker

    plain = ray_worker.print_to_stdstream
    if getattr(plain, "is_quiet", False):
        return

    def chosen(data: dict[str, Any], ignore_prefix: bool) -> None:
        if wanted := wanted_lines(data):
            plain({**data, "lines": wanted}, ignore_prefix)

    chosen.is_quiet = True  # pyright: ignore[reportFunctionMemberAccess]
    ray_worker.print_to_stdstream = chosen


def wanted_lines(data: dict[str, Any]) -> list[str]:
    """Those for the terminal of a batch of Ray's: {"lines": [...], "actor_name": ..., ...}."""
    if str(data.get("actor_name", "")).startswith(_ACTORS):
        return []
    return [each for each in data.get("lines", []) if not any(part in each for part in _LINES)]
