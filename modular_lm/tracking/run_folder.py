"""A run's folder: what lies where, the event log, the metrics files and the stop request.

These files are the truth about a run and need none of our tools to be read. MLflow and the
terminal are readers of them (`follower`), so an outage there costs nothing here.

`events.jsonl` is appended by processes of one host only, for which appends are safe on a shared
file system too: with Ray those on the driver's host (the driver itself, Ray Train's controller, the
dataset manager), without Ray rank 0. One line is `{"time": ISO 8601 UTC, "event": kind, ...}` with
these kinds and fields:

    created         uid, name, global_batch_size, batch_size, grad_acc_steps, data (fingerprint),
                    init_ckpt_path
    attempt         attempt, start_step, steps_again (done before, behind the checkpoint, and to
                    be done again), world_size, hosts, addresses (of every rank, with Ray),
                    config_changes ("key: old -> new", ...), data_changes (likewise, allowed by
                    data.allow_change), data (fingerprint), init_ckpt_path (of the first)
    attempt_end     attempt, outcome (done | stopped | resized | preempted | hung | failed | lost),
                    reason, step, steps, seconds, world_size, hosts; lost: its driver was killed,
                    and the line is written by the next one
    checkpoint      step, path, data_digest (of all samples seen), bytes, seconds; the last three
                    are missing where the writer was killed before it could tell
    validation      step, and its results
    skipped         step, samples (first and last of its batch), loss, grad_norm, in_a_row: a step
                    that changed nothing, for loss or gradient were not finite
    spike           step, samples, loss, grad_norm, median and deviation of the losses before
    stop_requested  reason
    regroup_requested  reason: the workers are to save and end, for others to go on
    end             status (done | stopped | failed), step, exit_code, reason

`metrics.jsonl` (training) and `metrics.eval.jsonl` (validation and evaluation) are appended by
rank 0 only; one line is `{"global_step": S, "created_at": ISO 8601 UTC, name: number, ...}`.

JSON knows no NaN and no infinity: such a value is written as null, so that every reader gets a
column of numbers, and its field `nonfinite` says what it was: `{"loss/out": "nan"}`.
"""

from __future__ import annotations

import errno
import json
import math
import os
import weakref
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from modular_lm.files import full_disk_named, replacing, write_text_atomic


class RunFolder:
    """Names of everything in a run's folder (`dump_dir`), its event log and its stop request."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).absolute()

    def __repr__(self) -> str:
        return f"RunFolder({str(self.path)!r})"

    def create(self) -> None:
        """Make the folder and those below it that several processes write into."""
        for folder in (self.path, self.logs, self.ray):
            folder.mkdir(parents=True, exist_ok=True)

    @property
    def config(self) -> Path:
        """The resolved config of the latest attempt."""
        return self.path / "config.yaml"

    @property
    def base_config(self) -> Path:
        """The config as it was given."""
        return self.path / "base_config.yaml"

    @property
    def code(self) -> Path:
        """Snapshot of the code that ran."""
        return self.path / "code"

    @property
    def logs(self) -> Path:
        """One log file per rank."""
        return self.path / "logs"

    @property
    def checkpoints(self) -> Path:
        """One folder per saved step, unless `checkpoint.path` names another place."""
        return self.path / "checkpoints"

    @property
    def ray(self) -> Path:
        """Ray's own storage, and the stop request."""
        return self.path / "ray"

    @property
    def last_step(self) -> StepMark:
        """The last step that was done, saved or not."""
        return StepMark(self.ray / "last_step")

    @property
    def events_file(self) -> Path:
        """The event log."""
        return self.path / "events.jsonl"

    @property
    def metrics(self) -> JsonLines:
        """Training lines."""
        return JsonLines(self.path / "metrics.jsonl")

    @property
    def eval_metrics(self) -> JsonLines:
        """Validation and evaluation lines."""
        return JsonLines(self.path / "metrics.eval.jsonl")

    def evaluation(self, step: int) -> Path:
        """What was measured after `step` steps, beyond the lines of `eval_metrics`."""
        return self.path / "evals" / f"{step:010d}"

    def curves_file(self, step: int) -> Path:
        """Validation losses by position in chunk and by chunk, as `eval.positions` writes them."""
        return self.evaluation(step) / "positions.json"

    def dump(self, step: int) -> Path:
        """The rows of a step after which the run gave up: `about.json`, `rank_*.npz`."""
        return self.path / "dumps" / f"{step:010d}"

    def documents_file(self, step: int) -> Path:
        """Validation losses of every document, as `eval.documents` writes them."""
        return self.evaluation(step) / "documents.json"

    def log_file(self, rank: int) -> Path:
        """The log of one rank."""
        return self.logs / f"rank_{rank:05d}.log"

    # ------------------------------------------------------------------ events

    def append_event(self, kind: str, **fields: Any) -> None:
        """Append one line to the event log and wait until it is on the disk.

        Safe from several threads and processes of one host. Raises RunFailedError on a full disk.
        """
        _append(self.events_file, {"time": _now(), "event": kind, **fields}, sync=True)

    def events(self) -> Iterator[dict[str, Any]]:
        """All events, oldest first; lines that a crash left incomplete are passed over."""
        return iter(JsonLines(self.events_file))

    def last_event(self, kind: str) -> dict[str, Any] | None:
        """The newest event of that kind, if there is one."""
        last = None
        for event in self.events():
            if event.get("event") == kind:
                last = event
        return last

    # ------------------------------------------------------------------ stop request

    @property
    def stop_file(self) -> Path:
        """A run stops when this file appears; its text is the reason. Users may touch it too."""
        return self.ray / "stop"

    def request_stop(self, reason: str) -> None:
        """Ask the run to save a checkpoint and end at the next step that all ranks agree on."""
        self.stop_file.parent.mkdir(parents=True, exist_ok=True)
        write_text_atomic(self.stop_file, reason + "\n")

    def stop_requested(self) -> str | None:
        """The reason of a pending stop request. One failing `open` per call where there is none."""
        return _text_of(self.stop_file)

    def clear_stop(self) -> None:
        """Forget the stop request, if there is one."""
        self.stop_file.unlink(missing_ok=True)

    # ------------------------------------------------------------------ another group of workers

    @property
    def regroup_file(self) -> Path:
        """As `stop_file`, but the run goes on from its checkpoint with other workers."""
        return self.ray / "regroup"

    def request_regroup(self, reason: str) -> None:
        """Ask the workers to save a checkpoint and end, so that others can take over."""
        write_text_atomic(self.regroup_file, reason + "\n")

    def stop_or_regroup_requested(self) -> str | None:
        """The reason of a pending request to save and end. Cheap enough for every step."""
        return self.stop_requested() or _text_of(self.regroup_file)

    def clear_regroup(self) -> None:
        """Forget the request for other workers, if there is one."""
        self.regroup_file.unlink(missing_ok=True)

    # ------------------------------------------------------------------ ranks that stand still

    def stuck_file(self, rank: int) -> Path:
        """Where a rank of the latest attempt stands still, as `train.watchdog` writes it."""
        return self.ray / "stuck" / f"{rank:05d}.json"

    def stuck(self) -> dict[int, dict[str, Any]]:
        """What the ranks of the latest attempt that stand still have written, by rank."""
        files = sorted((self.ray / "stuck").glob("*.json"))
        return {int(file.stem): json.loads(file.read_bytes()) for file in files}

    def clear_stuck(self) -> None:
        """Forget them."""
        for file in (self.ray / "stuck").glob("*.json"):
            file.unlink(missing_ok=True)


class JsonLines:
    """A file of JSON objects, one per line, that one process appends to and others may read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, fields: Mapping[str, Any]) -> None:
        """Write one line, with `created_at` added. Raises RunFailedError on a full disk."""
        _append(self.path, {**fields, "created_at": _now()}, sync=False)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """All lines, oldest first; those that a crash left incomplete are passed over."""
        if not self.path.exists():
            return
        with open(self.path, "rb") as file:
            for raw in file:
                if (line := parse_line(raw)) is not None:
                    yield line

    def cut_after(self, step: int) -> int:
        """Drop the lines of steps beyond `step`, and what is no whole line; how many were dropped.

        For a run that goes back to the checkpoint of `step` and will write those lines again. The
        file is replaced at once, and is never in memory as a whole. Raises RunFailedError on a
        full disk.
        """
        if not self.path.exists():
            return 0
        with open(self.path, "rb") as old:
            if not any(_is_cut(raw, step) for raw in old):
                return 0
            old.seek(0)
            dropped = 0
            with replacing(self.path) as new:
                for raw in old:
                    if _is_cut(raw, step):
                        dropped += 1
                    else:
                        new.write(raw)
        return dropped


class StepMark:
    """A number of steps in a file of its own, cheap enough to be written at every step.

    Survives the death of its writer; not, for certain, that of the machine.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor: int | None = None

    def write(self, step: int) -> None:
        """Replace the number. Raises RunFailedError on a full disk."""
        with full_disk_named(self._path):
            if self._descriptor is None:
                self._descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT, 0o666)
                weakref.finalize(self, os.close, self._descriptor)
            os.pwrite(self._descriptor, b"%20d\n" % step, 0)

    def read(self) -> int:
        """The number; 0 if none was written."""
        try:
            return int(self._path.read_bytes())
        except (FileNotFoundError, ValueError):
            return 0

    def forget(self) -> None:
        """Back to 0."""
        self._path.unlink(missing_ok=True)


def metric_values(line: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a metrics line, but for its step, with NaN and infinities put back."""
    values = {
        name: float(value)
        for name, value in line.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and name != "global_step"
    }
    return values | {name: float(text) for name, text in line.get("nonfinite", {}).items()}


def parse_line(raw: bytes) -> dict[str, Any] | None:
    """One line of a JSON lines file; None if it is not a whole JSON object."""
    try:
        line = json.loads(raw)
    except ValueError:
        return None
    return line if isinstance(line, dict) else None


def _is_cut(raw: bytes, step: int) -> bool:
    line = parse_line(raw)
    return line is None or line.get("global_step", step) > step


def _text_of(request: Path) -> str | None:
    try:
        return request.read_text(encoding="utf-8").strip() or f"found {request}"
    except FileNotFoundError:
        return None


def _append(path: Path, line: dict[str, Any], *, sync: bool) -> None:
    nonfinite: dict[str, str] = {}
    line = _finite(line, "", nonfinite)
    if nonfinite:
        line["nonfinite"] = nonfinite
    data = json.dumps(line, ensure_ascii=False, allow_nan=False).encode("utf-8") + b"\n"
    with full_disk_named(path):
        descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            if not _ends_with_newline(descriptor):
                data = b"\n" + data
            # One write call: appends of several processes follow each other, they never mix.
            if os.write(descriptor, data) < len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            if sync:
                os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _ends_with_newline(descriptor: int) -> bool:
    """False where a crash or a full disk left a part of a line, which would spoil the next one."""
    size = os.fstat(descriptor).st_size
    return size == 0 or os.pread(descriptor, 1, size - 1) == b"\n"


def _finite(value: Any, name: str, found: dict[str, str]) -> Any:
    """`value` with None for NaN and infinities, which are recorded in `found` by dotted name."""
    if isinstance(value, float) and not math.isfinite(value):
        found[name] = str(float(value))
        return None
    if isinstance(value, Mapping):
        prefix = f"{name}." if name else ""
        return {key: _finite(item, f"{prefix}{key}", found) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item, f"{name}.{i}", found) for i, item in enumerate(value)]
    return value


def _now() -> str:
    # Always with its microseconds: times are to sort as text.
    return datetime.now(UTC).isoformat(timespec="microseconds")
