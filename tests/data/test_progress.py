"""Progress: speeds and the time left, also of a run that goes on from another."""

from __future__ import annotations

import pytest

from modular_lm.data import progress
from modular_lm.data.progress import Progress


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def test_lines(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    progress = Progress("wiki: wrote shard", 4, 400, taken=(0, 0))
    for seconds in (1.0, 9.0, 1.0, 9.0):
        clock.now += seconds
        progress.add(100, documents=1000, tokens=50_000)
    assert [record.message for record in caplog.records] == [
        "prepare wiki: wrote shard 2/4 in 10.0 s, 2,000 documents (200/s), "
        "100,000 tokens (10,000/s), 10 s left",
        "prepare wiki: wrote shard 4/4 in 20.0 s, 4,000 documents (200/s), "
        "200,000 tokens (10,000/s)",
    ]


def test_what_was_taken_over_counts_as_done_but_not_as_speed(clock: Clock, caplog) -> None:
    caplog.set_level("INFO")
    progress = Progress("a: tokenised part", 10, 1000, taken=(8, 800), later=0.5)
    clock.now += 10
    progress.add(100, documents=20, tokens=200)
    # 100 of 1 000 are left, and a pass that takes half as long as all of them.
    assert "part 9/10 in 10.0 s, 20 documents (2/s), 200 tokens (20/s), 60 s left" in caplog.text
    clock.now += 10
    progress.add(100, documents=20, tokens=200)
    assert "part 10/10 in 20.0 s, 40 documents (2/s), 400 tokens (20/s), 50 s left" in caplog.text
