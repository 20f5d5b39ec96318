"""Readers of a running run: threads that hand new lines of its files to sinks.

Each sink has its own thread and its own place in the files, so that a slow or broken one delays
nobody. Sinks say what lines mean (`console`, `mlflow_projection`); this module knows only files.

A sink gets every line at least once and in the order of its file; lines of several files that are
found together come in the order of their times. It may get a line again: when its `flush` failed,
or when a file was rewritten because the run went back to a checkpoint.
"""

from __future__ import annotations

import heapq
import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from modular_lm.tracking.run_folder import RunFolder, parse_line

log = logging.getLogger(__name__)

RETRY_SECONDS = 30.0
_LINES_PER_FLUSH = 500


class Sink(Protocol):
    """Something that shows or forwards the lines of a run. Called by one thread only."""

    name: str
    interval: float
    """Seconds between two looks at the files."""

    def event(self, line: dict[str, Any]) -> None:
        """Take one line of the event log."""
        ...

    def metrics(self, line: dict[str, Any]) -> None:
        """Take one training line."""
        ...

    def evaluation(self, line: dict[str, Any]) -> None:
        """Take one validation or evaluation line."""
        ...

    def flush(self) -> None:
        """Lines were taken since the last call. If this raises they are all handed over again."""
        ...

    def close(self) -> None:
        """No more lines will come."""
        ...


class Follower:
    """Hands the lines of a run to sinks in the background, from `start` until `stop`.

    Nothing that a sink does reaches the caller: its first error is logged, then it is tried again
    every RETRY_SECONDS, and the other sinks go on.
    """

    def __init__(self, folder: RunFolder, sinks: Sequence[Sink]) -> None:
        self._stopping = threading.Event()
        self._threads = [
            # Daemons: a sink that hangs in a dead connection must not keep the process alive.
            threading.Thread(
                target=self._follow,
                args=(_Feed(folder, sink),),
                name=f"follow-{sink.name}",
                daemon=True,
            )
            for sink in sinks
        ]

    def start(self) -> None:
        """Start following, from the beginning of the files."""
        for thread in self._threads:
            thread.start()

    def stop(self, timeout: float = 20.0) -> None:
        """Hand over what is left, close the sinks, and return within `timeout` seconds."""
        self._stopping.set()
        deadline = time.monotonic() + timeout
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
            if thread.is_alive():
                log.warning(
                    "%s: not finished after %.0f s and left behind; the next attempt catches up",
                    thread.name,
                    timeout,
                )

    def _follow(self, feed: _Feed) -> None:
        pause = 0.0
        while not self._stopping.wait(pause):
            pause = feed.sink.interval if feed.drain() else RETRY_SECONDS
        feed.drain()
        feed.close()


def replay(folder: RunFolder, sink: Sink) -> None:
    """Hand all lines of a run to one sink, in this thread. Raises what its `flush` raises."""
    feed = _Feed(folder, sink)
    while feed.deliver():
        pass
    sink.close()


class Tail:
    """The lines of a growing JSON lines file, each read once.

    A file that has been replaced or shortened is read from its start.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._inode: int | None = None
        self._position = 0
        self._committed = 0

    def read(self, limit: int) -> list[dict[str, Any]]:
        """At most `limit` further lines; a line without its end stays for a later call."""
        lines: list[dict[str, Any]] = []
        if not self._path.exists():
            return lines
        with open(self._path, "rb") as file:
            self._notice_rewrite(file.fileno())
            file.seek(self._position)
            while len(lines) < limit and (raw := file.readline()).endswith(b"\n"):
                self._position += len(raw)
                if (line := parse_line(raw)) is not None:
                    lines.append(line)
        return lines

    def commit(self) -> None:
        """What has been read is done with."""
        self._committed = self._position

    def rewind(self) -> None:
        """Read again what has been read since the last commit."""
        self._position = self._committed

    def _notice_rewrite(self, descriptor: int) -> None:
        status = os.fstat(descriptor)
        if self._inode not in (None, status.st_ino) or status.st_size < self._position:
            self._position = self._committed = 0
        self._inode = status.st_ino


class _Feed:
    """One sink, its place in each file, and whether it is in trouble."""

    def __init__(self, folder: RunFolder, sink: Sink) -> None:
        self.sink = sink
        self._files: list[tuple[Tail, Callable[[dict[str, Any]], None]]] = [
            (Tail(folder.events_file), sink.event),
            (Tail(folder.metrics.path), sink.metrics),
            (Tail(folder.eval_metrics.path), sink.evaluation),
        ]
        self._failing = False
        self._complained = False

    def deliver(self) -> bool:
        """Hand over some lines; False if there were none. Raises what `flush` raises."""
        found = [
            [(line, take) for line in tail.read(_LINES_PER_FLUSH)] for tail, take in self._files
        ]
        # A merge, not a sort: where clocks of hosts differ each file still keeps its order.
        taken = list(heapq.merge(*found, key=lambda pair: _when(pair[0])))
        for line, take in taken:
            self._hand_over(take, line)
        try:
            if taken:
                self.sink.flush()
        except Exception:
            for tail, _ in self._files:
                tail.rewind()
            raise
        for tail, _ in self._files:
            tail.commit()
        return bool(taken)

    def drain(self) -> bool:
        """Hand over all lines there are; False if the sink failed."""
        try:
            while self.deliver():
                if self._failing:
                    log.info("%s: works again", self.sink.name)
                    self._failing = False
        except Exception as error:
            if not self._failing:
                log.warning(
                    "%s: %s; the run goes on, its files hold everything, tried again every %.0f s",
                    self.sink.name,
                    one_line(error),
                    RETRY_SECONDS,
                )
            self._failing = True
            return False
        return True

    def close(self) -> None:
        try:
            self.sink.close()
        except Exception as error:
            log.warning("%s: %s", self.sink.name, one_line(error))

    def _hand_over(self, take: Callable[[dict[str, Any]], None], line: dict[str, Any]) -> None:
        """A line that the sink cannot digest is passed over: it would fail again for ever."""
        try:
            take(line)
        except Exception:
            if not self._complained:
                log.warning("%s: cannot show %s", self.sink.name, line, exc_info=True)
            self._complained = True


def _when(line: dict[str, Any]) -> str:
    """When a line was written; the files' times sort as text."""
    return str(line.get("time") or line.get("created_at") or "")


def one_line(error: Exception) -> str:
    """An exception as one short line of a log."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= 300 else text[:297] + "..."
