"""What the user sees, on a terminal and in a log file."""

from __future__ import annotations

import io
import logging
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from modular_lm.tracking.console import (
    ConsoleProgress,
    describe_metrics,
    short_number,
    validation_table,
)
from modular_lm.tracking.follower import replay
from modular_lm.tracking.run_folder import RunFolder


def _line(step: int, seconds: float = 0.0) -> dict[str, Any]:
    at = datetime(2026, 1, 1, tzinfo=UTC) + timedelta(seconds=seconds)
    return {
        "global_step": step,
        "created_at": at.isoformat(),
        "loss/out": 2.31,
        "loss/bpb": 1.43,
        "optim/lr": 3e-4,
        "speed/wps": 12345.6,
    }


def _event(kind: str, **fields: Any) -> dict[str, Any]:
    return {"time": datetime.now(UTC).isoformat(), "event": kind, **fields}


@pytest.fixture
def plain(caplog: pytest.LogCaptureFixture) -> ConsoleProgress:
    caplog.set_level(logging.INFO, "modular_lm.tracking.console")
    return ConsoleProgress(600, Console(file=io.StringIO()))


def test_the_progress_line() -> None:
    text = describe_metrics(_line(120), 600, timedelta(seconds=83.4))
    expected = "step 120/600  loss 2.310  bpb 1.430  lr 3.0e-04  12.3k tok/s  left 0:01:23"
    assert text == expected


def test_the_progress_line_shows_a_lost_loss() -> None:
    line = {**_line(120), "loss/out": None, "nonfinite": {"loss/out": "nan"}}
    assert "loss nan" in describe_metrics(line, 600, None)


def test_time_left_follows_the_pace(
    plain: ConsoleProgress, caplog: pytest.LogCaptureFixture
) -> None:
    plain.event(_event("attempt", attempt=1, start_step=0, world_size=2))
    plain.metrics(_line(100, 0))
    plain.metrics(_line(200, 50))
    assert "left" not in caplog.messages[-2]
    assert caplog.messages[-1].endswith("left 0:03:20")


def test_history_is_not_shown(plain: ConsoleProgress, caplog: pytest.LogCaptureFixture) -> None:
    plain.event({**_event("attempt", attempt=1, start_step=0), "time": "2020-01-01T00:00:00+00:00"})
    plain.metrics(_line(10))
    assert caplog.messages == []
    plain.event(_event("attempt", attempt=2, start_step=10, world_size=2))
    plain.metrics(_line(10))
    plain.metrics(_line(20))
    assert [m.split("  ")[0] for m in caplog.messages] == [
        "attempt 2 from step 10, 2 workers",
        "step 20/600",
    ]


def test_steps_done_again_are_shown_again(
    plain: ConsoleProgress, caplog: pytest.LogCaptureFixture
) -> None:
    plain.event(_event("attempt", attempt=1, start_step=0, world_size=1))
    plain.metrics(_line(20))
    plain.event(_event("attempt_end", attempt=1, outcome="failed", reason="worker died", step=7))
    plain.event(_event("attempt", attempt=2, start_step=10, world_size=1))
    plain.metrics(_line(10))
    plain.metrics(_line(20))
    steps = [m.split("  ")[0] for m in caplog.messages if m.startswith("step")]
    assert steps == ["step 20/600", "step 20/600"]
    assert "attempt 1 failed at step 7: worker died" in caplog.messages


def test_validation_table() -> None:
    line = {"global_step": 5, "created_at": "x"}
    for source, nll in (("all", 2.5), ("wiki", 2.25), ("books", 2.75)):
        line |= {f"validation/{source}/nll": nll, f"validation/{source}/avg_seqlen": 200.5}
    rows = validation_table(line)
    assert rows[0].split() == ["source", "nll", "bpb", "ppl", "avg_seqlen"]
    assert [row.split() for row in rows[1:]] == [
        ["books", "2.75", "200.5"],
        ["wiki", "2.25", "200.5"],
        ["all", "2.5", "200.5"],
    ]
    assert len({len(row) for row in rows}) == 1
    assert validation_table({"global_step": 5}) == []


def test_events_are_one_line_each(plain: ConsoleProgress, caplog: pytest.LogCaptureFixture) -> None:
    plain.event(_event("created", uid="u", name="x"))
    plain.event(
        _event("attempt", attempt=1, start_step=0, world_size=2, config_changes=["steps: 1 -> 2"])
    )
    plain.event(_event("checkpoint", step=5, path="/r/checkpoints/5"))
    bad = {"loss": None, "grad_norm": None, "nonfinite": {"loss": "nan", "grad_norm": "inf"}}
    plain.event(_event("skipped", step=4, samples=[24, 31], in_a_row=2, **bad))
    bad = {"loss": 2.5, "grad_norm": None, "nonfinite": {"grad_norm": "nan"}}
    plain.event(_event("skipped", step=5, samples=[32, 39], in_a_row=3, **bad))
    spike = {"loss": 9.5, "grad_norm": 3.0, "median": 2.5, "deviation": 0.012}
    plain.event(_event("spike", step=6, samples=[40, 47], **spike))
    plain.event(_event("stop_requested", reason="SIGINT"))
    plain.event(_event("end", status="stopped", step=6, exit_code=3, reason="SIGINT"))
    assert caplog.messages == [
        "attempt 1 from step 0, 2 workers; steps: 1 -> 2",
        "checkpoint of step 5: /r/checkpoints/5",
        "step 4 changed nothing: loss nan, gradient norm inf (samples 24..31, 2 in a row)",
        "step 5 changed nothing: loss 2.500, gradient norm nan (samples 32..39, 3 in a row)",
        "spike at step 6: loss 9.500 after 2.500 ± 0.012 (samples 40..47)",
        "stop requested: SIGINT",
        "stopped at step 6: SIGINT",
    ]


def test_on_a_terminal_there_is_a_bar_and_logs_go_above_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(sys, "stderr", screen)
    handler = logging.StreamHandler(screen)
    logging.getLogger().addHandler(handler)
    try:
        console = ConsoleProgress(600, Console(force_terminal=True, width=120, stderr=True))
        console.event(_event("attempt", attempt=1, start_step=0, world_size=2))
        console.metrics(_line(120))
        assert handler.stream is not screen
        console.metrics(_line(600, 50))
        console.close()
        assert handler.stream is screen
    finally:
        logging.getLogger().removeHandler(handler)
    shown = screen.getvalue()
    assert "attempt 1 from step 0, 2 workers" in shown
    assert "step 600/600  loss 2.310" in shown
    assert "\x1b[2K" in shown


def test_as_a_sink_of_a_real_folder(tmp_path: Path, plain: ConsoleProgress) -> None:
    folder = RunFolder(tmp_path)
    folder.append_event("attempt", attempt=1, start_step=0, world_size=1)
    folder.metrics.append({"global_step": 1, "loss/out": 5.0})
    folder.eval_metrics.append({"global_step": 1, "validation/all/nll": 5.0})
    replay(folder, plain)


@pytest.mark.parametrize(
    ("value", "text"), [(0.0, "0.0"), (999.0, "999.0"), (12345.0, "12.3k"), (3.2e12, "3.2T")]
)
def test_short_number(value: float, text: str) -> None:
    assert short_number(value) == text
