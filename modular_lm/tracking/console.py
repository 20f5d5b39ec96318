"""What a user sees of a running run: a progress line, validation tables, events.

On a terminal one line with a bar that stays in place; elsewhere the same text as log lines. Shows
what happens from now on, not the history of a resumed run.
"""

from __future__ import annotations

import logging
import sys
from collections import deque
from datetime import UTC, datetime, timedelta
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from modular_lm.tracking.run_folder import metric_values

log = logging.getLogger(__name__)

_COLUMNS = ("nll", "bpb", "ppl", "avg_seqlen")
_PACE_WINDOW = 20


class ConsoleProgress:
    """The sink (see `follower.Sink`) that shows a run of `steps` steps to its user."""

    name = "console"
    interval = 0.5

    def __init__(self, steps: int, console: Console | None = None) -> None:
        self._steps = steps
        self._console = console or Console(stderr=True)
        self._bar: tuple[Progress, TaskID] | None = None
        self._began = datetime.now(UTC)
        # Steps up to these have been shown; None until an attempt of this session begins.
        self._shown: int | None = None
        self._shown_evaluation: int | None = None
        self._pace: deque[tuple[datetime, int]] = deque(maxlen=_PACE_WINDOW)

    def event(self, line: dict[str, Any]) -> None:
        """Say what happened, if it happened in this session."""
        if datetime.fromisoformat(line["time"]) < self._began:
            return
        if line["event"] == "attempt":
            self._shown = self._shown_evaluation = line["start_step"]
            self._pace.clear()
        if text := describe_event(line):
            self._say(text)

    def metrics(self, line: dict[str, Any]) -> None:
        """Show where the run is."""
        step = line["global_step"]
        if self._shown is None or step <= self._shown:
            return
        self._shown = step
        self._pace.append((datetime.fromisoformat(line["created_at"]), step))
        text = describe_metrics(line, self._steps, self._time_left(step))
        if self._console.is_terminal:
            self._show_bar(step, text)
        else:
            log.info(text)

    def evaluation(self, line: dict[str, Any]) -> None:
        """Show validation results as a table."""
        step = line["global_step"]
        if self._shown_evaluation is None or step <= self._shown_evaluation:
            return
        self._shown_evaluation = step
        if rows := validation_table(line):
            self._say("\n".join([f"validation at step {step}", *rows]))

    def flush(self) -> None:
        """Everything has been shown at once."""

    def close(self) -> None:
        """Leave the bar as it is and the terminal to others."""
        if self._bar is not None:
            above_bar = sys.stderr
            self._bar[0].stop()
            _move_logs(above_bar, sys.stderr)

    def _time_left(self, step: int) -> timedelta | None:
        (began, first), (now, last) = self._pace[0], self._pace[-1]
        if last == first:
            return None
        return (now - began) / (last - first) * max(0, self._steps - step)

    def _show_bar(self, step: int, text: str) -> None:
        if self._bar is None:
            columns = (BarColumn(bar_width=20), TextColumn("{task.description}", markup=False))
            progress = Progress(*columns, console=self._console, refresh_per_second=2)
            self._bar = (progress, progress.add_task(text, total=self._steps))
            terminal = sys.stderr
            progress.start()
            _move_logs(terminal, sys.stderr)
        progress, task = self._bar
        progress.update(task, completed=step, description=text)

    def _say(self, text: str) -> None:
        if self._console.is_terminal:
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            for row in text.splitlines():
                log.info(row)


def _move_logs(old: TextIO, new: TextIO) -> None:
    """Send log lines through the stream that rich puts before the terminal, above the bar."""
    for handler in logging.getLogger().handlers:
        if isinstance(handler, logging.StreamHandler) and handler.stream is old:
            handler.setStream(new)


def describe_metrics(line: dict[str, Any], steps: int, left: timedelta | None) -> str:
    """`step 120/600  loss 2.310  bpb 1.430  lr 3.0e-04  12.3k tok/s  left 0:01:23`."""
    values = metric_values(line)
    parts = [f"step {line['global_step']}/{steps}"]
    for name, form in (
        ("loss/out", "loss {:.3f}"),
        ("loss/bpb", "bpb {:.3f}"),
        ("optim/lr", "lr {:.1e}"),
    ):
        if name in values:
            parts.append(form.format(values[name]))
    if "speed/wps" in values:
        parts.append(f"{short_number(values['speed/wps'])} tok/s")
    if left is not None:
        parts.append(f"left {timedelta(seconds=round(left.total_seconds()))}")
    return "  ".join(parts)


def validation_table(line: dict[str, Any]) -> list[str]:
    """Rows of text: a header, then one line per source, `all` last."""
    results: dict[str, dict[str, float]] = {}
    for name, value in metric_values(line).items():
        source, _, column = name.removeprefix("validation/").rpartition("/")
        if name.startswith("validation/") and column in _COLUMNS:
            results.setdefault(source, {})[column] = value
    if not results:
        return []
    width = max(len(source) for source in results)
    rows = [f"  {'source':<{max(width, 6)}}" + "".join(f"{c:>12}" for c in _COLUMNS)]
    for source in sorted(results, key=lambda name: (name == "all", name)):
        found = results[source]
        cells = (f"{found[c]:>12.4g}" if c in found else f"{'':>12}" for c in _COLUMNS)
        rows.append(f"  {source:<{max(width, 6)}}" + "".join(cells))
    return rows


def describe_event(line: dict[str, Any]) -> str | None:
    """One line for the user; None for events that are shown otherwise."""
    match line["event"]:
        case "attempt":
            changes = "".join(f"; {change}" for change in line.get("config_changes") or ())
            start = f"attempt {line['attempt']} from step {line['start_step']}"
            return f"{start}, {line.get('world_size')} workers{changes}"
        case "attempt_end" if line["outcome"] not in ("done", "stopped"):
            why = f": {line['reason']}" if line["reason"] else ""
            return f"attempt {line['attempt']} {line['outcome']} at step {line['step']}{why}"
        case "checkpoint":
            return f"checkpoint of step {line['step']}: {line['path']}"
        case "skipped":
            first, last = line["samples"]
            what = f"loss {_number(line, 'loss')}, gradient norm {_number(line, 'grad_norm')}"
            where = f"samples {first}..{last}, {line['in_a_row']} in a row"
            return f"step {line['step']} changed nothing: {what} ({where})"
        case "spike":
            first, last = line["samples"]
            loss = f"loss {line['loss']:.3f} after {line['median']:.3f} ± {line['deviation']:.3f}"
            return f"spike at step {line['step']}: {loss} (samples {first}..{last})"
        case "stop_requested":
            return f"stop requested: {line['reason']}"
        case "regroup_requested":
            return f"going on with other workers: {line['reason']}"
        case "end":
            reason = f": {line['reason']}" if line.get("reason") else ""
            return f"{line['status']} at step {line.get('step')}{reason}"
    return None


def _number(line: dict[str, Any], name: str) -> str:
    """A value of an event that may be none that JSON knows."""
    return line.get("nonfinite", {}).get(name) or f"{line[name]:.3f}"


def short_number(value: float) -> str:
    """12345.0 -> `12.3k`."""
    for suffix in ("", "k", "M", "G"):
        if abs(value) < 1000:
            return f"{value:.1f}{suffix}"
        value /= 1000
    return f"{value:.1f}T"
