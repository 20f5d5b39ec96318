"""The side of a run that trains nothing: begins it, attends it, and says how it ended.

Signals become a stop request in the run's folder; the terminal and MLflow follow the run's files
in threads; the event log gets its last line. Used by the Ray driver and, without Ray, by rank 0.
"""

from __future__ import annotations

import contextlib
import logging
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import Any

from modular_lm.errors import EXIT_DONE, EXIT_FAILED, EXIT_STOPPED, ConfigError, UserFacingError
from modular_lm.errors import reason as reason_of
from modular_lm.files import Locked, lock
from modular_lm.tracking.console import ConsoleProgress
from modular_lm.tracking.follower import Follower, Sink
from modular_lm.tracking.mlflow_projection import MlflowProjection, tracking_uri
from modular_lm.tracking.run_folder import RunFolder
from modular_lm.train.attempts import end_attempt
from modular_lm.train.inventory import step_folder
from modular_lm.train.run import Run
from modular_lm.train.watchdog import describe

log = logging.getLogger(__name__)

_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


def drive(
    run: Run,
    given: dict[str, Any],
    execute: Callable[[], int | None],
    sinks: Sequence[Sink] | None = None,
) -> int:
    """Run `execute` with everything around it; returns the exit code.

    given: the config as the user gave it; execute: trains and returns the step at which training
    ended, None if it was stopped before it began; sinks: for a run that is a part of something
    larger, who follows it instead of the terminal and MLflow: then signals are left to others, too.
    Raises ConfigError if another process trains this run.
    """
    folder, alone = run.folder, sinks is None
    mirrors = _mirrors(run) if sinks is None else sinks
    say = print if alone else log.info
    if run.is_complete:
        say(f"{run.config.name} is complete: step {run.done_steps} of {run.stop_step}")
        if alone:
            print(where_things_are(run))
        # The driver may have died before its last lines, or MLflow been away.
        run.record_checkpoints()
        end_attempt(run.folder, "lost", "its driver was killed")
        if (folder.last_event("end") or {}).get("status") != "done":
            _end(run, "done", EXIT_DONE, None)
        _follow(folder, mirrors).stop()
        return EXIT_DONE
    run.check_storage()
    with _only_one(folder):
        run.begin(given)
        console = [ConsoleProgress(run.stop_step)] if alone else []
        follower = _follow(folder, [*console, *mirrors])
        try:
            with stop_on_signals(folder) if alone else contextlib.nullcontext():
                step = execute()
        except (KeyboardInterrupt, SystemExit):
            # A second Ctrl-C, or SIGTERM while Ray was starting and had its own handler in place.
            _end(run, "stopped", EXIT_STOPPED, "interrupted, without a new checkpoint")
            follower.stop()
            raise KeyboardInterrupt from None
        except BaseException as error:
            code = error.exit_code if isinstance(error, UserFacingError) else EXIT_FAILED
            _end(run, "failed", code, reason_of(error))
            follower.stop()
            raise
        stopped = folder.stop_requested()
        complete = step is not None and step >= run.stop_step
        code = EXIT_DONE if complete else EXIT_STOPPED
        _end(run, "done" if complete else "stopped", code, None if complete else stopped)
        folder.clear_stop()
        follower.stop()
    if not complete:
        say(f"stopped at step {run.done_steps} ({stopped}); the same command continues")
    if alone:
        print(where_things_are(run))
    return code


def where_things_are(run: Run) -> str:
    """Paths of what a run has left, for the end of a job's output."""
    folder, mlflow = run.folder, run.config.logging.mlflow
    lines = [f"  run folder   {folder.path}"]
    if run.done_steps:
        lines.append(f"  checkpoint   {step_folder(run.checkpoints, run.done_steps)}")
        lines.append(f"  metrics      {folder.metrics.path}")
    if mlflow.enabled:
        lines.append(f"  MLflow       {tracking_uri(mlflow.tracking_uri, folder.path)}")
    return "\n".join(lines)


@contextlib.contextmanager
def stop_on_signals(folder: RunFolder) -> Iterator[None]:
    """SIGINT, SIGTERM, SIGUSR1 and SIGUSR2 request a stop; a second SIGINT aborts."""
    interrupts = 0

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal interrupts
        interrupts += number == signal.SIGINT
        if interrupts > 1:
            raise KeyboardInterrupt
        name = signal.Signals(number).name
        if folder.stop_requested() is None:
            folder.request_stop(name)
            folder.append_event("stop_requested", reason=name)
            log.info("%s: stopping after a checkpoint (Ctrl-C again aborts without one)", name)

    before = {number: signal.signal(number, handle) for number in _STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _mirrors(run: Run) -> list[Sink]:
    """Where the run is shown beside the terminal. Raises ConfigError for an impossible address."""
    c = run.config.logging.mlflow
    if not c.enabled:
        return []
    return [MlflowProjection(run.folder, c.tracking_uri, c.experiment, run.config.name)]


def _follow(folder: RunFolder, sinks: Sequence[Sink]) -> Follower:
    follower = Follower(folder, sinks)
    follower.start()
    return follower


def end_hung(run: Run, world_size: int) -> None:
    """Record and say that the ranks stand still, where the driver is one of them."""
    why = describe(run.folder, world_size) or "no progress"
    end_attempt(run.folder, "hung", why)
    _end(run, "failed", EXIT_FAILED, why)
    print(f"error: {why}", file=sys.stderr, flush=True)


def _end(run: Run, status: str, code: int, why: str | None) -> None:
    # The disk may be what failed; the reason must still reach the user.
    with contextlib.suppress(OSError, UserFacingError):
        end_attempt(run.folder, status, why)
        run.folder.append_event(
            "end", status=status, step=run.done_steps, exit_code=code, reason=why
        )


@contextlib.contextmanager
def _only_one(folder: RunFolder) -> Iterator[None]:
    """Hold the run's lock, so that two commands never train in one folder."""
    try:
        with lock(folder.ray / "driver.lock", blocking=False):
            yield
    except Locked as error:
        raise ConfigError(
            f"dump_dir={folder.path}: is being trained by {error.holder}; "
            "wait for it, stop it, or use another dump_dir"
        ) from None
