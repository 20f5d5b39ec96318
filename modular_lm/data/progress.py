"""Progress of a pass over many tasks, as log lines: how much is done, how fast, how long it takes.

Knows nothing of what the tasks do.
"""

from __future__ import annotations

import logging
import time

log = logging.getLogger(__name__)

_LOG_SECONDS = 5.0


class Progress:
    """Logs a line every few seconds and at the end.

    tasks, total: how many tasks there are and what the amounts given to `add` sum to; taken: the
    same for those that were finished before and are not added. Speeds are those of this process.
    later: what follows this pass, as a multiple of all of it.
    """

    def __init__(
        self, what: str, tasks: int, total: int, *, taken: tuple[int, int], later: float = 0.0
    ) -> None:
        self._what, self._tasks, self._total, self._later = what, tasks, total, later
        self._done, self._taken = taken
        self._amount = self._documents = self._tokens = 0
        self._start = self._logged = time.monotonic()

    def add(self, amount: int, *, documents: int, tokens: int) -> None:
        """Another task is done."""
        self._done += 1
        self._amount += amount
        self._documents += documents
        self._tokens += tokens
        now = time.monotonic()
        last = self._done == self._tasks
        if last or now - self._logged >= _LOG_SECONDS:
            self._logged = now
            self._log(max(1e-9, now - self._start), last)

    def seconds_left(self, seconds: float) -> float:
        """After `seconds` of work: how long this pass and what follows it still take."""
        left = self._total - self._taken - self._amount + self._later * self._total
        return seconds * max(0.0, left) / max(1, self._amount)

    def _log(self, seconds: float, last: bool) -> None:
        text = (
            f"prepare {self._what} {self._done:,}/{self._tasks:,} in {seconds:.1f} s, "
            f"{self._documents:,} documents ({self._documents / seconds:,.0f}/s), "
            f"{self._tokens:,} tokens ({self._tokens / seconds:,.0f}/s)"
        )
        if not (last and not self._later):
            text += f", {self.seconds_left(seconds):.0f} s left"
        log.info(text)
