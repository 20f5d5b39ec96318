"""Lines reach every sink, whatever happens to the files and to the other sinks."""

from __future__ import annotations

import json
import logging
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from modular_lm.tracking import follower
from modular_lm.tracking.follower import Follower, Tail, replay
from modular_lm.tracking.run_folder import RunFolder


class Recorder:
    """A sink that keeps what was flushed, and misbehaves when told to."""

    name = "recorder"
    interval = 0.01

    def __init__(self) -> None:
        self.flushed: list[tuple[str, Any]] = []
        self.taken: list[tuple[str, Any]] = []
        self.fail_in_flush = threading.Event()
        self.fail_on_step: int | None = None
        self.new = threading.Event()
        self.closed = False

    def event(self, line: dict[str, Any]) -> None:
        self.taken.append(("event", line["event"]))

    def metrics(self, line: dict[str, Any]) -> None:
        if line["global_step"] == self.fail_on_step:
            raise ValueError("indigestible")
        self.taken.append(("metrics", line["global_step"]))

    def evaluation(self, line: dict[str, Any]) -> None:
        self.taken.append(("evaluation", line["global_step"]))

    def flush(self) -> None:
        taken, self.taken = self.taken, []
        if self.fail_in_flush.is_set():
            raise OSError("no server")
        self.flushed += taken
        self.new.set()

    def close(self) -> None:
        self.closed = True

    def steps(self) -> list[int]:
        return [step for kind, step in self.flushed if kind == "metrics"]


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    run = RunFolder(tmp_path / "run")
    run.create()
    return run


def _append(folder: RunFolder, *steps: int) -> None:
    for step in steps:
        folder.metrics.append({"global_step": step})


def test_tail_reads_each_line_once(folder: RunFolder) -> None:
    tail = Tail(folder.metrics.path)
    assert tail.read(10) == []
    _append(folder, 1, 2, 3)
    assert [line["global_step"] for line in tail.read(2)] == [1, 2]
    assert [line["global_step"] for line in tail.read(2)] == [3]
    assert tail.read(2) == []


def test_tail_waits_for_the_end_of_a_line(folder: RunFolder) -> None:
    tail = Tail(folder.metrics.path)
    folder.metrics.path.write_bytes(b'{"global_step": 1}\n{"global_')
    assert tail.read(10) == [{"global_step": 1}]
    with open(folder.metrics.path, "ab") as file:
        file.write(b'step": 2}\n')
    assert tail.read(10) == [{"global_step": 2}]


def test_tail_starts_again_after_a_cut_even_if_the_file_grew_back(folder: RunFolder) -> None:
    tail = Tail(folder.metrics.path)
    _append(folder, 1, 2, 3)
    tail.read(10)
    tail.commit()
    folder.metrics.cut_after(1)
    _append(folder, 2, 3, 4)
    assert [line["global_step"] for line in tail.read(10)] == [1, 2, 3, 4]
    tail.rewind()
    assert [line["global_step"] for line in tail.read(10)] == [1, 2, 3, 4]


def test_replay_hands_over_everything(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(follower, "_LINES_PER_FLUSH", 4)
    folder.append_event("created", uid="u")
    _append(folder, *range(1, 11))
    folder.eval_metrics.append({"global_step": 5})
    sink = Recorder()
    replay(folder, sink)
    assert sink.steps() == list(range(1, 11))
    assert ("event", "created") in sink.flushed
    assert ("evaluation", 5) in sink.flushed
    assert sink.closed


def test_lines_found_together_come_in_the_order_of_their_times(folder: RunFolder) -> None:
    folder.append_event("attempt")
    _append(folder, 1)
    folder.eval_metrics.append({"global_step": 1})
    _append(folder, 2)
    folder.append_event("end")
    sink = Recorder()
    replay(folder, sink)
    assert [what for _, what in sink.flushed] == ["attempt", 1, 1, 2, "end"]


def test_a_file_keeps_its_order_where_a_later_host_has_an_earlier_clock(folder: RunFolder) -> None:
    times = ("2026-01-01T10:00:00", "2026-01-01T12:00:00", "2026-01-01T09:00:00")
    for step, time_text in enumerate(times, start=1):
        with open(folder.metrics.path, "a") as file:
            file.write(json.dumps({"global_step": step, "created_at": time_text}) + "\n")
    folder.append_event("end")
    sink = Recorder()
    replay(folder, sink)
    assert sink.steps() == [1, 2, 3]


def test_lines_arrive_while_the_run_goes_on_and_stop_drains(folder: RunFolder) -> None:
    sink = Recorder()
    running = Follower(folder, [sink])
    running.start()
    _append(folder, 1)
    assert sink.new.wait(10)
    _append(folder, 2, 3)
    running.stop()
    assert sink.steps() == [1, 2, 3]
    assert sink.closed


def test_a_failed_flush_is_repeated_and_reported_once(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(follower, "RETRY_SECONDS", 0.01)
    caplog.set_level(logging.INFO, "modular_lm.tracking.follower")
    broken, healthy = Recorder(), Recorder()
    broken.fail_in_flush.set()
    running = Follower(folder, [broken, healthy])
    running.start()
    _append(folder, 1, 2)
    assert healthy.new.wait(10)
    time.sleep(0.2)
    broken.fail_in_flush.clear()
    running.stop()
    assert broken.steps() == [1, 2]
    assert healthy.steps() == [1, 2]
    messages = [record.message for record in caplog.records]
    assert sum("OSError: no server" in message for message in messages) == 1
    assert messages[-1] == "recorder: works again"


def test_a_line_that_cannot_be_shown_holds_up_nothing(
    folder: RunFolder, caplog: pytest.LogCaptureFixture
) -> None:
    sink = Recorder()
    sink.fail_on_step = 2
    _append(folder, 1, 2, 3)
    replay(folder, sink)
    assert sink.steps() == [1, 3]
    assert sum("cannot show" in record.message for record in caplog.records) == 1


def test_stop_is_bounded_by_its_timeout(
    folder: RunFolder, caplog: pytest.LogCaptureFixture
) -> None:
    sink = Recorder()
    release = threading.Event()
    sink.flush = release.wait  # type: ignore[method-assign,assignment]
    _append(folder, 1)
    running = Follower(folder, [sink])
    running.start()
    began = time.monotonic()
    running.stop(timeout=0.3)
    assert time.monotonic() - began < 5
    assert "left behind" in caplog.text
    release.set()
