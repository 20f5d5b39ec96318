"""The event log and the metrics files, where processes die and disks fill up."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modular_lm.errors import RunFailedError
from modular_lm.tracking.run_folder import JsonLines, RunFolder, metric_values, parse_line


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    run = RunFolder(tmp_path / "run")
    run.create()
    return run


def _steps(lines: JsonLines) -> list[int]:
    return [line["global_step"] for line in lines]


def _append_many(path: Path, writer: int) -> None:
    run = RunFolder(path)
    for i in range(50):
        run.append_event("validation", writer=writer, i=i, padding="x" * (997 * (i % 7)))


def test_concurrent_events_never_mix(folder: RunFolder) -> None:
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_append_many, args=(folder.path, w)) for w in range(4)]
    for process in writers:
        process.start()
    for process in writers:
        process.join()
        assert process.exitcode == 0
    raw = folder.events_file.read_bytes().splitlines()
    assert all(parse_line(line) is not None for line in raw if line)
    events = list(folder.events())
    for writer in range(4):
        assert [e["i"] for e in events if e["writer"] == writer] == list(range(50))


def test_event_holds_kind_time_and_fields(folder: RunFolder) -> None:
    folder.append_event("attempt", attempt=1, hosts=["n0"])
    folder.append_event("checkpoint", step=10)
    folder.append_event("attempt", attempt=2, hosts=["n1"])
    last = folder.last_event("attempt")
    assert last is not None
    assert (last["attempt"], last["hosts"]) == (2, ["n1"])
    assert last["time"].endswith("+00:00")
    assert folder.last_event("end") is None


def test_no_events_in_a_new_folder(tmp_path: Path) -> None:
    assert list(RunFolder(tmp_path / "none").events()) == []


def test_a_torn_line_spoils_neither_itself_nor_the_next(folder: RunFolder) -> None:
    folder.append_event("created", uid="u")
    with open(folder.events_file, "ab") as file:
        file.write(b'{"event": "checkp')
    assert [e["event"] for e in folder.events()] == ["created"]
    folder.append_event("end", status="failed")
    assert [e["event"] for e in folder.events()] == ["created", "end"]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nonfinite_numbers_are_valid_json_and_come_back(folder: RunFolder, value: float) -> None:
    folder.metrics.append({"global_step": 3, "loss/out": value, "optim/lr": 0.5})
    raw = folder.metrics.path.read_text()
    line = json.loads(raw, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert line["loss/out"] is None
    values = metric_values(line)
    assert values.keys() == {"loss/out", "optim/lr"}
    assert str(values["loss/out"]) == str(value)


def test_nested_nonfinite_numbers(folder: RunFolder) -> None:
    folder.append_event("validation", step=1, results={"all": {"nll": math.nan}})
    (event,) = folder.events()
    assert event["results"] == {"all": {"nll": None}}
    assert event["nonfinite"] == {"results.all.nll": "nan"}


def test_metric_values_are_numbers_only() -> None:
    line = {"global_step": 7, "created_at": "2026-01-01", "a": 1, "b": True, "c": "x", "d": None}
    assert metric_values(line) == {"a": 1.0}


@given(
    steps=st.lists(st.integers(1, 50), min_size=0, max_size=30, unique=True).map(sorted),
    cut=st.integers(0, 55),
    torn=st.booleans(),
)
@settings(deadline=None, max_examples=40)
def test_cut_after(tmp_path_factory: pytest.TempPathFactory, steps: list, cut: int, torn: bool):
    lines = JsonLines(tmp_path_factory.mktemp("cut") / "metrics.jsonl")
    for step in steps:
        lines.append({"global_step": step, "loss/out": 1 / step})
    before = list(lines)
    if torn:
        with open(lines.path, "ab") as file:
            file.write(b'{"global_step": 1, "lo')
    dropped = lines.cut_after(cut)
    assert list(lines) == [line for line in before if line["global_step"] <= cut]
    assert dropped == sum(step > cut for step in steps) + torn
    assert not lines.path.exists() or lines.path.read_bytes()[-1:] in (b"\n", b"")
    assert lines.cut_after(cut) == 0


def test_cut_leaves_the_file_alone_where_nothing_is_to_drop(folder: RunFolder) -> None:
    folder.metrics.append({"global_step": 1})
    inode = folder.metrics.path.stat().st_ino
    assert folder.metrics.cut_after(1) == 0
    assert folder.metrics.path.stat().st_ino == inode
    assert _steps(folder.metrics) == [1]


def test_an_interrupted_cut_leaves_the_old_file(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (1, 2, 3):
        folder.metrics.append({"global_step": step})

    def crash(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(KeyboardInterrupt):
        folder.metrics.cut_after(1)
    assert _steps(folder.metrics) == [1, 2, 3]
    assert [p.name for p in folder.path.iterdir() if p.name.endswith(".tmp")] == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_full_disk_names_the_file() -> None:
    with pytest.raises(RunFailedError, match=r"^/dev/full: No space left on device; free"):
        JsonLines(Path("/dev/full")).append({"global_step": 1})


def test_short_write_is_a_full_disk(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    whole_write = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: whole_write(fd, data[:5]))
    with pytest.raises(RunFailedError, match=r"metrics\.jsonl: No space left"):
        folder.metrics.append({"global_step": 1})
    monkeypatch.undo()
    folder.metrics.append({"global_step": 2})
    assert _steps(folder.metrics) == [2]


def test_stop_request(folder: RunFolder) -> None:
    assert folder.stop_requested() is None
    folder.request_stop("SIGUSR1")
    assert RunFolder(folder.path).stop_requested() == "SIGUSR1"
    folder.clear_stop()
    folder.clear_stop()
    assert folder.stop_requested() is None


def test_a_user_may_touch_the_stop_file(folder: RunFolder) -> None:
    folder.stop_file.touch()
    assert folder.stop_requested() == f"found {folder.path}/ray/stop"


def test_the_last_step_is_the_one_written_last(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.create()
    assert folder.last_step.read() == 0
    mark = folder.last_step
    for step in (1, 12, 7):
        mark.write(step)
        assert folder.last_step.read() == step
    folder.last_step.forget()
    assert folder.last_step.read() == 0
