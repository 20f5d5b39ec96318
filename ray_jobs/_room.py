"""How many trials of a sweep run at a time: one more whenever the cluster has room for it.

Looked at again and again, so that nodes that come are used, and CPUs that other jobs hold are left
to them. What trials that run will still need is kept for them: a trial begins before its workers
do, and between two attempts it has none.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from datetime import UTC, datetime

from modular_lm.config.checks import world_sizes
from modular_lm.errors import ConfigError
from modular_lm.train.attempts import open_attempt
from ray_jobs._cluster import ask_for, room_for, use_gpu
from ray_jobs._trial import Job

_LOOK_EVERY_S = 2.0


class Room:
    """Lets trials in. at_most: as many at a time, whatever room there is; wanted: so many a cluster
    that can grow is asked to hold.
    """

    def __init__(self, jobs: Mapping[str, Job], at_most: int, wanted: int | None = None) -> None:
        self._jobs, self._at_most, self._wanted = jobs, at_most, wanted
        # Since when each runs, as event logs write times.
        self._running: dict[str, str] = {}
        self._not_before = 0.0
        self._has_asked = False

    def admits(self, name: str) -> bool:
        """Whether this trial may begin now; it is counted as running then.

        One always may: it waits until there is room for its workers, and asks the cluster to grow.
        """
        if self._running and (len(self._running) >= self._at_most or not self._is_room_for(name)):
            return False
        self._running[name] = datetime.now(UTC).isoformat(timespec="microseconds")
        return True

    def leave(self, name: str) -> None:
        """It has ended."""
        self._running.pop(name, None)

    def close(self) -> None:
        """No trial runs any more: a cluster that has grown for them may shrink."""
        if self._has_asked:
            ask_for()

    def _is_room_for(self, name: str) -> bool:
        if time.monotonic() < self._not_before:
            return False
        config = self._jobs[name].run.config.ray
        most = world_sizes(config)[1]
        try:
            on_gpu = use_gpu(config)
        except ConfigError:
            return True  # it fails by itself, with the reason
        free = room_for(config, on_gpu, free=True)
        if free - self._kept(config.cpus_per_worker, on_gpu) >= most:
            return True
        self._not_before = time.monotonic() + _LOOK_EVERY_S
        if self._wanted is not None:
            ask_for(config, most * self._wanted)
            self._has_asked = True
        return False

    def _kept(self, cpus_per_worker: int, on_gpu: bool) -> int:
        """Of the free room, in workers of so many CPUs, what trials that run have yet to take."""
        workers = cpus = 0
        for name, since in self._running.items():
            run = self._jobs[name].run
            attempt = open_attempt(run.folder)
            # An older one is of a driver that was killed.
            has = attempt["world_size"] if attempt and attempt["time"] >= since else 0
            missing = max(0, world_sizes(run.config.ray)[1] - has)
            workers += missing
            cpus += missing * run.config.ray.cpus_per_worker
        return max(math.ceil(cpus / cpus_per_worker), workers if on_gpu else 0)
