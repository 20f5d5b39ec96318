"""Ends a process of training that stands still, and leaves word of where it stood.

A thread beside the trainer, in every rank: a rank that waits in a collective, or for data, or for
a lock cannot notice that by itself. When no step has come to its end for too long, the thread
writes the stacks of all threads to the rank's log and a summary to the run's folder, waits until
the other ranks will have done so, too, and ends the process, whoever started it: Ray or torchrun
then end the attempt. What it says to the user is `describe`.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from modular_lm.errors import EXIT_FAILED
from modular_lm.files import write_text_atomic
from modular_lm.tracking.run_folder import RunFolder

log = logging.getLogger(__name__)

_TIMES_SLOWEST_STEP = 10
# A phase that is no step (loading and the first step, validation, saving) may take longer by this.
_PATIENCE_WITH_PHASES = 6
_GRACE_S = 2
_OURS = ("modular_lm", "ray_jobs")


class Watchdog:
    """Watches the thread that makes it, until it is closed.

    timeout_s: what a step may take, unless ten times the slowest so far is more; 0: anything.
    hung: called, on this rank, before the process ends.
    """

    def __init__(
        self, folder: RunFolder, rank: int, timeout_s: float, hung: Callable[[], None] | None = None
    ) -> None:
        self._folder, self._rank, self._timeout, self._hung = folder, rank, timeout_s, hung
        self._watched = threading.get_ident()
        self._slowest = 0.0
        self._step: int | None = None
        self._phase: str | None = "start"
        self._since = time.monotonic()
        self._closed = threading.Event()
        if timeout_s:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def beat(self, step: int) -> None:
        """`step` steps are done."""
        now = time.monotonic()
        if self._phase is None:
            self._slowest = max(self._slowest, now - self._since)
        self._step, self._phase, self._since = step, None, now

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """What is done in the block is no step, and may take longer."""
        before, self._phase, self._since = self._phase, name, time.monotonic()
        try:
            yield
        finally:
            # Of what remains of a step its first part is not known any more.
            self._phase, self._since = before, time.monotonic()

    def close(self) -> None:
        """Watch no longer."""
        self._closed.set()

    def _limit(self) -> float:
        patience = 1 if self._phase is None else _PATIENCE_WITH_PHASES
        return max(self._timeout * patience, self._slowest * _TIMES_SLOWEST_STEP)

    def _watch(self) -> None:
        while not self._closed.wait(min(1.0, self._timeout / 4)):
            waited, limit = time.monotonic() - self._since, self._limit()
            if waited > limit:
                self._bite(waited, limit, self._since)

    def _bite(self, waited: float, limit: float, since: float) -> None:
        frame = sys._current_frames().get(self._watched)
        where = describe_frame(frame) if frame is not None else "nowhere"
        doing = self._phase or "step"
        report = {"step": self._step, "phase": doing, "seconds": round(waited, 1), "where": where}
        try:
            log.error("no progress in %s for %.0f s: %s", doing, waited, where)
            with open(self._folder.log_file(self._rank), "a", encoding="utf-8") as file:
                file.write(f"All threads of rank {self._rank}, which stands still:\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
            _leave_word(self._folder.stuck_file(self._rank), report)
            # The others' watchdogs see the same, a little earlier or later.
            until = time.monotonic() + _GRACE_S + limit / 20
            while time.monotonic() < until:
                if self._closed.wait(0.1) or self._since != since:
                    log.warning("it goes on")
                    self._folder.stuck_file(self._rank).unlink()
                    return
            if self._hung is not None:
                self._hung()
        except Exception:
            log.exception("what stands still cannot be recorded")
        os._exit(EXIT_FAILED)


def _leave_word(file: Path, report: dict[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text_atomic(file, json.dumps(report))


def describe_frame(frame: FrameType) -> str:
    """Where a thread is: its innermost call, and the innermost of ours that led there."""
    innermost = _place(frame)
    ours: FrameType | None = frame
    while ours is not None and not ours.f_globals.get("__name__", "").startswith(_OURS):
        ours = ours.f_back
    return innermost if ours is None or ours is frame else f"{innermost}, from {_place(ours)}"


def _place(frame: FrameType) -> str:
    file = Path(frame.f_code.co_filename).name
    return f"{frame.f_code.co_name} ({file}:{frame.f_lineno})"


def describe(folder: RunFolder, world_size: int) -> str | None:
    """What the ranks of the latest attempt that stood still have left; None if none did."""
    found = folder.stuck()
    if not found:
        return None
    first = next(iter(found.values()))
    by_place: dict[str, list[int]] = {}
    for rank in range(world_size):
        report = found.get(rank)
        where = f"in {report['where']}" if report else "silent, without a stack"
        by_place.setdefault(where, []).append(rank)
    places = "; ".join(f"{_ranks(ranks)} {where}" for where, ranks in by_place.items())
    at = "before the first step" if first["step"] is None else f"after step {first['step']}"
    return (
        f"no progress for {first['seconds']:.0f} s ({first['phase']}, {at}): {places} "
        f"(stacks: {folder.logs})"
    )


def _ranks(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:8])) + (", ..." if len(ranks) > 8 else "")
    return f"rank {shown}" if len(ranks) == 1 else f"ranks {shown}"
