"""Ray Tune over the trials of a sweep: each when it is let in, stopped early where a rule says so.

What is done and what failed is recorded in the trials' own files (`modular_lm.sweep.folder`), so
nothing that Tune remembers is needed to continue: each round is a new experiment of Tune over what
is left.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, MedianStoppingRule
from ray.tune.schedulers import TrialScheduler as Scheduler
from ray.tune.search import Searcher

from modular_lm.config.sweep import SweepSettings
from modular_lm.errors import RunFailedError, reason
from modular_lm.sweep.folder import SweepFolder
from modular_lm.sweep.results import validation_loss
from ray_jobs._room import Room
from ray_jobs._trial import Job, result_of, train_trial

log = logging.getLogger(__name__)

_ENVIRONMENT = {
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "RAY_AIR_NEW_OUTPUT": "0",  # else it prints tables, whatever `verbose` says
    # A trial that is stopped early, or fails, may have no loss.
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
}
# What a rule's request to stop begins with. Whatever else stops a trial has interrupted it.
_BY_RULE = "sweep.scheduler="
_REDUCTION = 2
_ENOUGH_FOR_A_MEDIAN = 3


def run_round(
    folder: SweepFolder,
    settings: SweepSettings,
    jobs: Mapping[str, Job],
    room: Room,
    attend: Callable[[Recorder], None],
) -> Recorder:
    """Run these trials until each has ended, or a stop of the sweep has ended them.

    attend: called about twice a second meanwhile. Returns what was recorded. Raises RunFailedError
    if Tune itself fails.
    """
    os.environ.update(_ENVIRONMENT)
    # It warns of trials without metrics, and prints tracebacks of those that died: the recorder
    # says what became of each. What Tune itself dies of is raised.
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    recorder = Recorder(folder, len(jobs))
    rule = stop_rule(settings, folder, jobs)
    storage = folder.path / "ray" / "tune"
    shutil.rmtree(storage, ignore_errors=True)
    # On the driver's node, for all that writes a run's event log must run on one host; and of a
    # resource that it takes from nobody.
    here = {f"node:{ray.util.get_node_ip_address()}": 0.001}
    tuner = tune.Tuner(
        tune.with_resources(_trainable(jobs), tune.PlacementGroupFactory([here])),
        tune_config=tune.TuneConfig(
            search_alg=InOrder(jobs, next(iter(jobs.values())).sweep.stop_requested, room),
            num_samples=len(jobs),
            scheduler=rule,
        ),
        run_config=tune.RunConfig(
            name="round", storage_path=str(storage), callbacks=[recorder], verbose=0
        ),
    )
    failure: list[BaseException] = []
    thread = threading.Thread(target=_fit, args=(tuner, failure), daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(0.5)
        attend(recorder)
    room.close()
    if failure:
        raise RunFailedError(f"Ray Tune failed: {reason(failure[0])}") from failure[0]
    shutil.rmtree(storage, ignore_errors=True)
    return recorder


def _fit(tuner: tune.Tuner, failure: list[BaseException]) -> None:
    # Off the main thread Tune leaves the signal handlers to us.
    try:
        tuner.fit()
    except BaseException as error:
        failure.append(error)


def _trainable(jobs: Mapping[str, Job]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    handed = dict(jobs)

    def trial(config: dict[str, Any]) -> dict[str, Any]:
        return train_trial(handed[config["trial"]])

    return trial


class InOrder(Searcher):
    """Suggests the trials one after the other as there is room, none once the sweep is to stop."""

    def __init__(self, names: Iterable[str], stopped: Callable[[], str | None], room: Room) -> None:
        super().__init__()
        self._names, self._stopped, self._room = list(names), stopped, room
        self._suggested: dict[str, str] = {}

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """The configuration of the next trial, None while there is no room for it."""
        if not self._names or self._stopped():
            return self.FINISHED
        if not self._room.admits(self._names[0]):
            return None
        name = self._suggested[trial_id] = self._names.pop(0)
        return {"trial": name}

    def on_trial_complete(
        self, trial_id: str, result: dict | None = None, error: bool = False
    ) -> None:
        """It runs no more, however it has ended."""
        self._room.leave(self._suggested[trial_id])

    def save(self, checkpoint_path: str) -> None:
        """Nothing is needed: the trials' own files say what is left."""


class Recorder(tune.Callback):
    """Writes how each trial stands, as Tune sees it start and end."""

    def __init__(self, folder: SweepFolder, total: int) -> None:
        self._folder, self._total, self._n_done = folder, total, 0
        self.running: set[str] = set()
        self.ended: list[str] = []
        # Those that failed for a reason that another attempt would meet, too.
        self.hopeless: set[str] = set()
        # Those that were stopped, but by no rule: the next command continues them.
        self.interrupted: set[str] = set()

    def on_trial_start(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        """Called by Tune's loop, as all of these."""
        name = trial.config["trial"]
        self._folder.update(name, "running")
        self.running.add(name)
        log.info("%s: started (%d at a time)", name, len(self.running))

    def on_trial_complete(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        """The trial's function has returned, whatever it says."""
        name, result = trial.config["trial"], trial.last_result
        outcome, why = result.get("outcome", "failed"), result.get("why")
        if outcome == "stopped" and not str(why).startswith(_BY_RULE):
            self.interrupted.add(name)
            self._end(name, "pending", f"interrupted ({why}); the same command continues")
            return
        if result.get("is_final"):
            self.hopeless.add(name)
        self._end(name, outcome, None if outcome == "done" else why)

    def on_trial_error(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        """The trial's process has died."""
        why = _cause(trial.error_file)
        self._end(trial.config["trial"], "failed", f"its process ended: {why}")

    def _end(self, name: str, status: Any, why: str | None) -> None:
        self._folder.update(name, status, why)
        self.running.discard(name)
        self.ended.append(name)
        if status == "pending":
            log.info("%s: %s", name, why)
            return
        self._n_done += 1
        about = why or self._loss(name)
        about = f" ({about})" if about else ""
        log.info("%s: %s%s; %d of %d", name, status, about, self._n_done, self._total)

    def _loss(self, name: str) -> str | None:
        """The last validation loss of a trial, for people."""
        found = [validation_loss(line) for line in self._folder.run(name).eval_metrics]
        losses = [loss for loss in found if loss is not None]
        return f"loss {losses[-1]:.4f}" if losses else None


def _cause(file: str | None) -> str:
    """The last line of what Tune has written of a failure, of Ray's explanations the first part."""
    try:
        # Not `trial.get_error()`, which looks where Tune copies this file to, later or never.
        text = Path(file).read_text(encoding="utf-8") if file else ""
    except OSError as error:
        text = f"{file}: {reason(error)}"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    line = lines[-1] if lines else "Ray says nothing of it"
    return line.rpartition("Worker exit detail: ")[2].partition(" There are some potential")[0]


# ------------------------------------------------------------------ early stopping


class _Asks:
    """A rule of Tune whose decision to stop becomes a request to the run, which saves and ends.

    Tune itself would kill the trial's process, and leave its workers to be found by others. Nor is
    a trial paused, as the median would until it knows others: what is not saved would be lost.

    spared: trials of the baseline, which the others are compared with: the rule knows their results
    and stops none of them; asked: those that it has stopped, or that ended before
    """

    spared: set[str]
    asked: set[str]
    rule: str
    folder: SweepFolder

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict) -> str:
        """The rule's decision, once."""
        name = trial.config["trial"]
        if name in self.asked:
            return Scheduler.CONTINUE
        decision = self.hear(tune_controller, trial, result)
        if decision == Scheduler.STOP and name not in self.spared:
            self.asked.add(name)
            why = f"{_BY_RULE}{self.rule}: loss {result['loss']:.4f} at step {result['step']}"
            with contextlib.suppress(OSError):
                self.folder.run(name).request_stop(why)
        return Scheduler.CONTINUE

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict) -> None:
        """Nothing: what a trial returns says how it ended, and is no point of its curve."""

    def hear(self, tune_controller: Any, trial: Any, result: dict) -> str:
        """What the rule would do, which knows the result from now on."""
        return super().on_trial_result(tune_controller, trial, result)  # type: ignore[misc]


class Asha(_Asks, AsyncHyperBandScheduler):
    """Asynchronous successive halving."""


class Median(_Asks, MedianStoppingRule):
    """Worse than the median of the others so far."""

    def hear(self, tune_controller: Any, trial: Any, result: dict) -> str:
        """Also of a trial that it would have stopped before, which Ray's rule does not expect."""
        decision = super().hear(tune_controller, trial, result)
        self._stopped_trials.discard(trial)
        return decision


@dataclass(frozen=True)
class _Earlier:
    """A trial that an earlier command ran, as far as the rules look at one."""

    trial_id: str

    @property
    def config(self) -> dict[str, str]:
        return {"trial": self.trial_id}


def stop_rule(
    settings: SweepSettings, folder: SweepFolder, jobs: Mapping[str, Job]
) -> FIFOScheduler:
    """Tune's scheduler, which knows the curves of the trials that are there already."""
    if settings.scheduler == "none":
        return FIFOScheduler()
    axis = settings.time_axis
    most = round(max(job.run.stop_step * job.per_step[axis] for job in jobs.values()))
    grace = settings.grace * most
    common = {"time_attr": axis, "metric": "loss", "mode": "min", "grace_period": grace}
    if settings.scheduler == "asha":
        rule = Asha(max_t=most, reduction_factor=_REDUCTION, stop_last_trials=False, **common)
    else:
        rule = Median(min_samples_required=_ENOUGH_FOR_A_MEDIAN, **common)
    records = {name: folder.read(name) or {} for name in jobs}
    rule.spared = {name for name, record in records.items() if record.get("baseline")}
    rule.asked, rule.rule, rule.folder = set(), settings.scheduler, folder
    _recall(rule, folder, jobs)
    return rule


def _recall(rule: Any, folder: SweepFolder, jobs: Mapping[str, Job]) -> None:
    for record in folder.trials():
        if record["name"] in jobs or record["status"] not in ("done", "stopped"):
            continue
        trial = _Earlier(record["name"])
        # Its end was decided before.
        rule.asked.add(trial.trial_id)
        tokens = record["tokens_per_step"]
        per_step = {"tokens": tokens, "flops": tokens * record["flops_per_token"]}
        lines = folder.run(trial.trial_id).eval_metrics
        rule.on_trial_add(_NoController(), trial)
        for line in lines:
            if (point := result_of(line, per_step)) is not None:
                rule.hear(_NoController(), trial, point)


class _NoController:
    """Where a rule looks for other trials that wait; none do for one of an earlier command."""

    def get_live_trials(self) -> list[Any]:
        return []
