"""Compare variants of a training run: train each with each seed, as many at a time as there is room
for, and write a report.

Every trial is a run as `ray_jobs.train` makes it, in its own folder below the sweep's. The same
command continues a sweep that was interrupted: what is done stays, what ran goes on from its
checkpoints, what failed is tried again, then as often as sweep.retries says. Exit code 1 if any
trial failed; the report says why.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from modular_lm.cli import run_job
from modular_lm.config import SweepConfig, TrainConfig
from modular_lm.config.checks import flatten, world_sizes
from modular_lm.config.load import from_dict
from modular_lm.config.schema import RayConfig
from modular_lm.data.dataset import check_sources
from modular_lm.errors import (
    EXIT_DONE,
    EXIT_FAILED,
    EXIT_STOPPED,
    ConfigError,
    UserFacingError,
    reason,
)
from modular_lm.files import Locked, lock
from modular_lm.sweep.dry_run import describe
from modular_lm.sweep.folder import Status, SweepFolder
from modular_lm.sweep.pilots import unmeasured, with_seconds
from modular_lm.sweep.search import grown
from modular_lm.sweep.trials import Arm, Plan, Trial, plan_sweep
from modular_lm.tracking.mlflow_sweep import MlflowSweep
from modular_lm.tracking.run_folder import RunFolder
from modular_lm.train.driver import stop_on_signals
from modular_lm.train.run import open_run, resolve_config

if TYPE_CHECKING:
    from ray_jobs._trial import Job, Mirror
    from ray_jobs._tune import Recorder

log = logging.getLogger(__name__)

USAGE = "python -m ray_jobs.sweep config=configs/ablation_debug.yaml key=value ..."
# Apart from the last: one takes seconds of many trials, in which no stop is passed on.
_REPORT_EVERY_S = 60
_MLFLOW_STATUS = {EXIT_DONE: "FINISHED", EXIT_FAILED: "FAILED", EXIT_STOPPED: "KILLED"}


def main(config: SweepConfig, given: dict[str, Any]) -> int:
    """The job: check everything, then run what is left of the sweep; returns the exit code."""
    plan = plan_sweep(config, given)
    resolved, tokenizer = resolve_config(from_dict(TrainConfig, plan.first_of_baseline.given))
    check_sources(resolved.data, tokenizer)
    sweep = Sweep(plan, config)
    if config.dry_run:
        print(describe(sweep.expanded()))
        return EXIT_DONE
    for warning in plan.warnings:
        log.warning(warning)
    with _only_one(sweep.folder):
        sweep.grow()
        sweep.requests.clear_stop()
        if sweep.is_unfinished():
            _run(sweep)
        return sweep.finish()


class Sweep:
    """A sweep at work: its plan, its folder, and what follows it."""

    def __init__(self, plan: Plan, config: SweepConfig) -> None:
        self.plan = self._defined = plan
        self._config, self.name = config, config.name
        self.folder = SweepFolder(plan.folder)
        # Its stop request lies where a run's would.
        self.requests = RunFolder(plan.folder)
        self._reported, self._next_report = 0, 0.0
        # Each command has the retries anew: what it was that failed, the user may have mended.
        self._failures_before = {r["name"]: r["failures"] for r in self.folder.trials()}
        self._hopeless: set[str] = set()
        self._interrupted: set[str] = set()
        m = from_dict(TrainConfig, plan.base).logging.mlflow
        self._mlflow = (
            MlflowSweep(plan.folder, m.tracking_uri, m.experiment, config.name)
            if m.enabled
            else None
        )

    def expanded(self) -> Plan:
        """The plan with the steps of those that were measured; of a search, with all that was and
        can be suggested. Writes nothing.
        """
        if self._defined.settings.searcher == "optuna":
            return grown(self._defined, self.folder, self._has_ended)
        return with_seconds(self._defined)

    def grow(self) -> bool:
        """Have the folder hold the trials of the plan as it is by now; returns whether more were
        suggested.
        """
        before, self.plan = self.plan, self.expanded()
        self.folder.begin(self.plan, self._config)
        return self.plan.unsuggested < before.unsuggested

    def measure(self) -> None:
        """Run the pilots that are to come; where one fails, the trials that wait for it do."""
        from ray_jobs._pilots import run_pilot

        if not (waiting := unmeasured(self.plan)):
            return
        for arms in waiting:
            if self.requests.stop_requested():
                break
            try:
                seconds = run_pilot(self.plan, arms[0], self.requests)
            # As of a trial, whatever it is: the others must not end with it.
            except Exception as error:
                if not isinstance(error, UserFacingError):
                    log.exception("pilot of %s", arms[0].name)
                self._without_steps(arms, "failed", f"its pilot: {reason(error)}")
                continue
            if seconds is not None:
                self.folder.measured(arms[0].name, seconds)
            elif not self.requests.stop_requested():
                why = "its pilot was stopped; the same command continues"
                self._without_steps(arms, "pending", why)
        self.grow()

    def _without_steps(self, arms: list[Arm], status: Status, why: str) -> None:
        for trial in (
            self.plan.trial(arm, seed) for arm in arms for seed in self.plan.settings.seeds
        ):
            self.folder.update(trial.name, status, why)
            (self._hopeless if status == "failed" else self._interrupted).add(trial.name)

    def is_unfinished(self) -> bool:
        """Whether this command, or the next one, has something left to do."""
        return any(map(self._is_left, self.plan.trials)) or self.plan.unsuggested > 0

    def due(self) -> list[Trial]:
        """The trials that this command is to run now or once more."""
        left = [trial for trial in self.plan.trials if self._is_left(trial)]
        return [trial for trial in left if trial.name not in self._interrupted]

    def _is_left(self, trial: Trial) -> bool:
        record = self.folder.read(trial.name)
        if record is None or trial.arm.config is None or trial.name in self._hopeless:
            return False
        if record["status"] == "failed":
            failures = record["failures"] - self._failures_before.get(trial.name, 0)
            return failures <= self.plan.settings.retries
        return record["status"] in ("pending", "running")

    def _has_ended(self, trial: Trial) -> bool:
        return self.folder.read(trial.name) is not None and not self._is_left(trial)

    def begin(self) -> None:
        """Make the sweep known to MLflow."""
        if self._mlflow is not None:
            settings = {k: v for k, v in flatten(vars(self.plan.settings)).items() if v is not None}
            self._mlflow.begin({f"sweep.{k}": v for k, v in settings.items()})

    def jobs(self) -> dict[str, Job]:
        """What to hand to Tune for the trials that are due, of a search with those that follow
        where none is; those that cannot begin have failed. Nothing when the sweep is at its end.
        """
        while not (found := self._jobs_due()):
            if not (self.plan.unsuggested and self.grow()):
                break
        return found

    def _jobs_due(self) -> dict[str, Job]:
        from ray_jobs._trial import Job

        found = {}
        for trial in self.due():
            try:
                resolved, tokenizer = resolve_config(from_dict(TrainConfig, trial.given))
                run = open_run(resolved, tokenizer, world_sizes(resolved.ray)[1])
            except UserFacingError as error:
                self._hopeless.add(trial.name)
                self.folder.update(trial.name, "failed", str(error))
                continue
            cost = trial.arm.cost
            assert cost is not None
            per_step = {"tokens": float(cost.tokens_per_step), "flops": cost.flops_per_step}
            found[trial.name] = Job(run, trial.given, per_step, self.requests, self._mirror(trial))
        return found

    def _mirror(self, trial: Trial) -> Mirror | None:
        from ray_jobs._trial import Mirror

        if self._mlflow is None:
            return None
        tags = {f"sweep.{key}": str(value) for key, value in trial.arm.values.items()}
        tags |= {"sweep": self.name, "sweep.arm": trial.arm.name, "sweep.seed": str(trial.seed)}
        tags |= self._mlflow.tags_of_trials()
        return Mirror(self._mlflow.tracking_uri, self._mlflow.experiment, tags)

    def attend(self, ended: list[str], running: set[str]) -> None:
        """Pass a stop on to the trials that run; when some have ended report, but not too often."""
        if asked := self.requests.stop_requested():
            for name in sorted(running):
                run = self.folder.run(name)
                if run.stop_requested() is None:
                    run.request_stop(asked)
        elif len(ended) > self._reported and time.monotonic() >= self._next_report:
            self._reported = len(ended)
            self._report()
            self._next_report = time.monotonic() + _REPORT_EVERY_S

    def settle(self, names: list[str], recorder: Recorder) -> None:
        """After a round: no trial of it is left without an end, but those that were interrupted."""
        self._hopeless |= recorder.hopeless
        self._interrupted |= recorder.interrupted
        self._reported = 0
        if self.requests.stop_requested():
            return
        for name in names:
            record = self.folder.read(name)
            has_no_end = record is not None and record["status"] in ("pending", "running")
            if has_no_end and name not in self._interrupted:
                self.folder.update(name, "failed", "Ray Tune ended without a result of it")

    def finish(self) -> int:
        """Write the report, say where it is and what failed; returns the exit code."""
        records = [self.folder.read(trial.name) for trial in self.plan.trials]
        status = {record["name"]: record["status"] for record in records if record}
        failed = [name for name, each in status.items() if each == "failed"]
        asked = self.requests.stop_requested()
        code = EXIT_FAILED if failed else EXIT_DONE
        if self.is_unfinished():
            code = EXIT_STOPPED
        summary = self._report()
        if self._mlflow is not None:
            pictures = sorted(self.folder.pictures.glob("*.svg"))
            files = [self.folder.report(kind) for kind in ("html", "md", "json")]
            files = [file for file in (*files, *pictures) if file.exists()]
            self._mlflow.finish(_MLFLOW_STATUS[code], {"trials.failed": str(len(failed))}, files)
        if summary:
            print(summary)
        for name in failed:
            record = self.folder.read(name)
            print(f"  failed: {name}: {record and record['why']}")
        for name in sorted(self._interrupted if not asked else ()):
            record = self.folder.read(name)
            print(f"  {name}: {record and record['why']}")
        if code == EXIT_STOPPED:
            why = asked or "trials were interrupted"
            print(f"stopped ({why}); the same command continues")
        print(f"  report       {self.folder.report('html')}")
        self.requests.clear_stop()
        return code

    def _report(self) -> str | None:
        from modular_lm.sweep.report import write_report
        from modular_lm.sweep.tables import headline

        try:
            return headline(write_report(self.folder))
        # Whatever it is: trials that run must not be left alone for it.
        except Exception as error:
            kind = "" if isinstance(error, UserFacingError) else f"{type(error).__name__}: "
            log.warning("no report: %s%s", kind, reason(error))
            return None


def _run(sweep: Sweep) -> None:
    """Round by round, until nothing is due or a stop is asked for."""
    from ray_jobs._session import SPARE_CPUS, ray_session

    settings = sweep.plan.settings
    # Those that a search will suggest are as large as those of its first round.
    trials = sweep.plan.trials if sweep.plan.unsuggested else sweep.due()
    configs = [trial.arm.config for trial in trials if trial.arm.config]
    largest = max((c.ray for c in configs), key=cpus_of)
    cpus = cpus_of(largest)
    # Of a Ray that is started here, whose logical CPUs are more than this machine has: as many as
    # it has cores for.
    here = min(settings.max_concurrent or max(1, (os.cpu_count() or 1) // cpus), len(configs))
    at_most = (settings.max_concurrent or len(configs)) if os.environ.get("RAY_ADDRESS") else here
    with stop_on_signals(sweep.requests), ray_session(num_cpus=here * cpus + SPARE_CPUS):
        from ray_jobs._cluster import use_gpu
        from ray_jobs._room import Room
        from ray_jobs._tune import run_round

        use_gpu(largest)  # GPUs that are missing are a mistake of the sweep, not of its trials
        sweep.begin()
        sweep.measure()
        while not sweep.requests.stop_requested() and (jobs := sweep.jobs()):
            log.info("%d trials, at most %d at a time", len(jobs), min(at_most, len(jobs)))
            room = Room(jobs, at_most, settings.max_concurrent)
            recorder = run_round(
                sweep.folder, settings, jobs, room, lambda r: sweep.attend(r.ended, r.running)
            )
            sweep.settle(list(jobs), recorder)


def cpus_of(config: RayConfig) -> int:
    """CPUs of the workers of a run, at its largest."""
    return world_sizes(config)[1] * config.cpus_per_worker


@contextlib.contextmanager
def _only_one(folder: SweepFolder) -> Iterator[None]:
    try:
        with lock(folder.path / "ray" / "sweep.lock", blocking=False):
            yield
    except Locked as error:
        raise ConfigError(
            f"dump_dir={folder.path}: this sweep is being run by {error.holder}; wait for it, stop "
            "it, or use another dump_dir"
        ) from None


if __name__ == "__main__":
    run_job(SweepConfig, main, what=__doc__ or "", usage=USAGE)
