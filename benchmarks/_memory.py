"""Memory and processor time of this process and all that it started, from Linux' /proc."""

from __future__ import annotations

import threading
from types import TracebackType

import psutil

SECONDS = 0.2  # between two looks


def family() -> list[psutil.Process]:
    """This process and its descendants."""
    me = psutil.Process()
    return [me, *me.children(recursive=True)]


def memory() -> int:
    """Bytes held by the family; what processes share is counted once (PSS)."""
    return sum(map(_pss, family()))


def cpu_seconds() -> float:
    """Processor time of the family so far; of those that have ended, their parents know."""
    total = 0.0
    for process in family():
        try:
            times = process.cpu_times()
        except psutil.Error:
            continue
        total += times.user + times.system
    return total


def _pss(process: psutil.Process) -> int:
    try:
        with open(f"/proc/{process.pid}/smaps_rollup") as lines:
            return next(int(line.split()[1]) << 10 for line in lines if line.startswith("Pss:"))
    except (OSError, StopIteration):  # it has ended
        return 0


class PeakMemory:
    """Looks at `memory` while its block runs; then `peak` is the most that was seen."""

    peak = 0

    def __enter__(self) -> PeakMemory:
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(SECONDS):
            self.peak = max(self.peak, memory())

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._done.set()
        self._thread.join()
