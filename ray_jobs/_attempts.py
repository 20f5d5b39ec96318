"""The attempts of a run on Ray: one worker group after the other until the run is done.

Each attempt is a `fit` of Ray Train that restarts nothing by itself. What comes after it is decided
here, where it is known why it ended: workers that crashed or stood still are started anew, within
a budget; nodes that will be taken away are left before they go, after a checkpoint; nodes that
have come are used. So every attempt has the size that the cluster has room for when it starts, and
every end its line in the event log.
"""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass
from typing import Any

from ray.exceptions import RayActorError
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError

from modular_lm.config.checks import largest_world, world_sizes
from modular_lm.config.schema import RayConfig
from modular_lm.errors import EXIT_BAD_INPUT, EXIT_FAILED, AgreedError, FullDiskError
from modular_lm.train.attempts import end_attempt, open_attempt
from modular_lm.train.run import Run
from modular_lm.train.watchdog import describe
from ray_jobs._cluster import leaving, room_for, use_gpu, wait_for_workers
from ray_jobs._failures import cause_of, explain

log = logging.getLogger(__name__)

_LOOK_EVERY_S = 0.5


@dataclass(frozen=True)
class Ended:
    """How an attempt ended: `outcome` and `reason` as in the event log.

    step: the last one, where the workers came to their end; code: the exit code, should the run
    end with it.
    """

    outcome: str
    reason: str | None = None
    step: int | None = None
    code: int = EXIT_FAILED


def run_attempts(run: Run) -> int | None:
    """Train; returns the step at which it ended, None if it was stopped between attempts.

    Raises AgreedError, RunFailedError or ConfigError.
    """
    c, folder = run.config.ray, run.folder
    on_gpu, budget = use_gpu(c), _Budget(c)
    while (size := wait_for_workers(run.config, on_gpu, folder.stop_requested)) is not None:
        folder.clear_regroup()
        attempt = _Attempt(run, size, on_gpu)
        if not attempt.attend():
            return None
        ended = attempt.ended()
        end_attempt(run.folder, ended.outcome, ended.reason)
        if ended.outcome in ("done", "stopped"):
            return ended.step
        budget.spend(ended, run)
    return None


class _Attempt:
    """A `fit` in a thread, because on the main thread it would take the signals from us."""

    def __init__(self, run: Run, size: int, on_gpu: bool) -> None:
        self._run, self._size, self._on_gpu = run, size, on_gpu
        self._result: dict[str, Any] | None = None
        self._error: BaseException | None = None
        self._event: dict[str, Any] | None = None
        # Why the workers were asked to end: resized or preempted.
        self._asked: Ended | None = None
        self._room_since: float | None = None
        trainer = _trainer(run, size, on_gpu)
        self._thread = threading.Thread(target=self._fit, args=(trainer,), daemon=True)
        self._thread.start()

    def _fit(self, trainer: TorchTrainer) -> None:
        try:
            self._result = trainer.fit().return_value
        except BaseException as error:
            self._error = error

    def attend(self) -> bool:
        """Look after it until it ends; False if the run was stopped before it had begun."""
        folder = self._run.folder
        while self._thread.is_alive():
            self._thread.join(_LOOK_EVERY_S)
            self._event = self._event or open_attempt(self._run.folder)
            if self._event is None:
                if folder.stop_requested():
                    return False
            elif self._asked is None and (change := self._change(self._event)):
                self._asked = change
                folder.append_event("regroup_requested", reason=change.reason)
                folder.request_regroup(str(change.reason))
        return True

    def _change(self, event: dict[str, Any]) -> Ended | None:
        """Why the run had better go on with other workers, if it had."""
        if gone := sorted(leaving() & set(event["addresses"])):
            return Ended("preempted", f"{', '.join(gone)} will be taken away")
        config = self._run.config
        if self._size == world_sizes(config.ray)[1]:
            return None
        room = room_for(config.ray, self._on_gpu, free=True)
        larger = largest_world(config, self._size + room)
        if larger <= self._size:
            self._room_since = None
            return None
        self._room_since = self._room_since or time.monotonic()
        if time.monotonic() - self._room_since < config.ray.resize_after_s:
            return None
        return Ended("resized", f"there is room for {larger} workers")

    def ended(self) -> Ended:
        """How it ended. Raises AgreedError for a failure that another attempt would meet, too."""
        run, error = self._run, self._error
        if error is None:
            assert self._result is not None
            if "error" in self._result:
                raise self._result["error"]
            step = self._result["step"]
            if step >= run.stop_step:
                return Ended("done", None, step)
            if stopped := run.folder.stop_requested():
                return Ended("stopped", stopped, step)
            return self._asked or Ended("resized", "as requested")
        if hung := describe(run.folder, self._size):
            return Ended("hung", hung)
        if self._asked is not None and self._asked.outcome == "preempted":
            return self._asked
        reason, code = explain(error)
        if code == EXIT_BAD_INPUT or isinstance(cause_of(error), FullDiskError):
            raise AgreedError(reason, code) from error
        if _was_preempted(error):
            return Ended("preempted", reason)
        return Ended("failed", reason, code=code)


class _Budget:
    """How often the run may be started anew."""

    def __init__(self, config: RayConfig) -> None:
        self._config = config
        self._failures = self._preemptions = self._saved = 0

    def spend(self, ended: Ended, run: Run) -> None:
        """Count an attempt that ended too early. Raises AgreedError when there were too many."""
        c = self._config
        if ended.outcome == "preempted":
            self._preemptions += 1
            if 0 <= c.max_preemptions < self._preemptions:
                used = f"ray.max_preemptions={c.max_preemptions} is used up"
                run.folder.request_stop(f"{ended.reason}; {used}")
        elif ended.outcome != "resized":
            if run.done_steps > self._saved:
                self._failures, self._saved = 0, run.done_steps
            self._failures += 1
            if self._failures > c.max_failures:
                raise AgreedError(f"{ended.reason} (logs: {run.folder.logs})", ended.code)
        log.info("attempt %s: %s; going on", ended.outcome, ended.reason)


def _was_preempted(error: BaseException) -> bool:
    """Whether workers died with a node that was drained, or a node went while they were placed."""
    if isinstance(getattr(error, "controller_failure", None), WorkerGroupStartupTimeoutError):
        return True
    failures = getattr(error, "worker_failures", {}).values()
    return any(isinstance(f, RayActorError) and f.preempted for f in failures)


def _trainer(run: Run, size: int, on_gpu: bool) -> TorchTrainer:
    from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig

    from ray_jobs._events import EventRecorder
    from ray_jobs._ingest import DATASET, PlanDataConfig
    from ray_jobs._worker import train_loop

    c = run.config.ray
    return TorchTrainer(
        train_loop,
        train_loop_config={"run": run, "use_gpu": on_gpu},
        torch_config=TorchConfig(backend="nccl" if on_gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=size,
            use_gpu=on_gpu,
            resources_per_worker={"CPU": c.cpus_per_worker, **({"GPU": 1} if on_gpu else {})},
        ),
        run_config=RunConfig(
            name="train",
            storage_path=str(run.folder.ray),
            failure_config=FailureConfig(
                max_failures=0, controller_failure_limit=0, max_preemption_failures=0
            ),
            callbacks=[EventRecorder(run.folder)],
            logging_config=LoggingConfig(log_level="WARNING"),
        ),
        # The stream is made by the data config, which knows the world and the start step.
        datasets={DATASET: _no_dataset},
        dataset_config=PlanDataConfig(run),
    )


def _no_dataset() -> Any:
    return None
