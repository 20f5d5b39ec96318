"""Early stopping and the order of trials, without a Ray to run them on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.tune.schedulers import FIFOScheduler

from modular_lm.config.sweep import SweepSettings
from modular_lm.sweep.folder import SweepFolder
from ray_jobs._tune import InOrder, Recorder, stop_rule
from tests.sweep.made_sweep import begun, finish

GRID = "sweep.params={model.module_agg: {grid: [drop, sum, avg, stack]}}"


@dataclass(frozen=True)
class FakeTrial:
    trial_id: str

    @property
    def config(self) -> dict[str, str]:
        return {"trial": self.trial_id}


def rule_and_trials(
    folder: SweepFolder, kind: Any, names: list[str]
) -> tuple[Any, dict[str, FakeTrial]]:
    per_step = {"tokens": 1.0, "flops": 10.0}
    jobs: Any = {
        n: SimpleNamespace(run=SimpleNamespace(stop_step=100), per_step=per_step) for n in names
    }
    rule: Any = stop_rule(SweepSettings(scheduler=kind, grace=0.5), folder, jobs)
    trials = {name: FakeTrial(name) for name in names}
    for trial in trials.values():
        rule.on_trial_add(None, trial)
    return rule, trials


def result(step: int, loss: float) -> dict[str, Any]:
    return {"loss": loss, "step": step, "tokens": step, "flops": 10 * step}


@pytest.mark.parametrize("kind", ["asha", "median"])
def test_a_bad_trial_is_asked_to_stop_after_the_grace_and_only_once(
    tmp_path: Path, kind: str
) -> None:
    folder, plan = begun(tmp_path / "s", GRID, "sweep.seeds=[0]")
    *good, bad = [trial.name for trial in plan.trials]
    rule, trials = rule_and_trials(folder, kind, [*good, bad])
    for step in (20, 40, 60):
        for number, name in enumerate([*good, bad]):
            loss = 9.0 if name == bad else 3.0 - step / 100 - number / 1000
            decision = rule.on_trial_result(Controller(), trials[name], result(step, loss))
            # Tune is never to kill one.
            assert decision == FIFOScheduler.CONTINUE
        asked = folder.run(bad).stop_requested()
        assert (asked is not None) == (step >= 50)
    assert asked == f"sweep.scheduler={kind}: loss 9.0000 at step 60"
    assert folder.run(good[-1]).stop_requested() is None
    folder.run(bad).clear_stop()
    rule.on_trial_result(Controller(), trials[bad], result(80, 9.0))
    assert folder.run(bad).stop_requested() is None


@pytest.mark.parametrize("kind", ["asha", "median"])
def test_what_a_trial_returns_is_no_point_of_its_curve(tmp_path: Path, kind: str) -> None:
    folder, plan = begun(tmp_path / "s", GRID, "sweep.seeds=[0]")
    *good, bad = [trial.name for trial in plan.trials]
    rule, trials = rule_and_trials(folder, kind, [*good, bad])
    for number, name in enumerate(good):
        for step in (20, 40, 60, 80):
            point = result(step, 3.0 - step / 100 + number / 1000)
            rule.on_trial_result(Controller(), trials[name], point)
        rule.on_trial_complete(Controller(), trials[name], {"outcome": "done", "why": None})
    for step in (20, 40, 60):
        rule.on_trial_result(Controller(), trials[bad], result(step, 9.0))
    asked = folder.run(bad).stop_requested()
    assert asked == f"sweep.scheduler={kind}: loss 9.0000 at step 60"


@pytest.mark.parametrize("kind", ["asha", "median"])
def test_the_baseline_counts_and_is_never_stopped(tmp_path: Path, kind: str) -> None:
    folder, plan = begun(tmp_path / "s", GRID, "sweep.seeds=[0]")
    first, *others = [trial.name for trial in plan.trials]
    assert [r["name"] for r in folder.trials() if r["baseline"]] == [first]
    rule, trials = rule_and_trials(folder, kind, [first, *others])
    for step in (20, 40, 60, 80):
        for number, name in enumerate([*others, first]):
            loss = 9.0 if name == first else 3.0 - step / 100 - number / 1000
            rule.on_trial_result(Controller(), trials[name], result(step, loss))
    assert folder.run(first).stop_requested() is None
    known = rule._results[trials[first]] if kind == "median" else rule._brackets[0]._rungs[-1][1]
    assert len(known) == 4


def test_the_median_takes_all_points_of_an_earlier_trial_that_was_bad(tmp_path: Path) -> None:
    folder, plan = begun(tmp_path / "s", GRID, "sweep.seeds=[0,1]")
    # By arm, then by seed: three good ones stand before those that are bad from the first point on.
    order = sorted(plan.trials, key=lambda trial: (plan.arms.index(trial.arm), trial.seed))
    *earlier, last = order
    for number, trial in enumerate(earlier):
        finish(folder, trial, 3.0 if number < 4 else 9.0)
    assert last.arm.cost is not None
    rate = {"tokens": last.arm.cost.tokens_per_step, "flops": last.arm.cost.flops_per_step}
    job: Any = SimpleNamespace(run=SimpleNamespace(stop_step=last.arm.steps), per_step=rate)
    rule: Any = stop_rule(SweepSettings(scheduler="median"), folder, {last.name: job})
    assert {len(points) for points in rule._results.values()} == {10}
    assert len(rule._results) == len(earlier)


def test_trials_of_an_earlier_command_count(tmp_path: Path) -> None:
    folder, plan = begun(tmp_path / "s", GRID, "sweep.seeds=[0]")
    *earlier, last = plan.trials
    for trial in earlier:
        finish(folder, trial, 3.0)
    total = last.arm.steps
    assert total is not None
    assert last.arm.cost is not None
    rate = {"tokens": last.arm.cost.tokens_per_step, "flops": last.arm.cost.flops_per_step}
    job: Any = SimpleNamespace(run=SimpleNamespace(stop_step=total), per_step=rate)
    rule: Any = stop_rule(SweepSettings(scheduler="asha"), folder, {last.name: job})
    trial = FakeTrial(last.name)
    rule.on_trial_add(None, trial)
    late = {"loss": 9.0, "step": total, "flops": 0.9 * total * rate["flops"]}
    rule.on_trial_result(Controller(), trial, late)
    assert folder.run(last.name).stop_requested() is not None


def test_no_rule_is_first_come_first_served(tmp_path: Path) -> None:
    folder, _ = begun(tmp_path / "s", GRID, "sweep.seeds=[0]")
    assert type(stop_rule(SweepSettings(), folder, {})) is FIFOScheduler


def test_trials_come_in_order_until_a_stop() -> None:
    asked: list[str] = []
    room: Any = Places(2)
    order = InOrder(["a", "b", "c", "d"], lambda: asked[0] if asked else None, room)
    assert [order.suggest("x"), order.suggest("y")] == [{"trial": "a"}, {"trial": "b"}]
    assert order.suggest("z") is None
    order.on_trial_complete("x", error=True)
    assert order.suggest("z") == {"trial": "c"}
    asked.append("SIGTERM")
    assert order.suggest("v") == order.FINISHED


@pytest.mark.parametrize(
    ("why", "status"),
    [
        ("sweep.scheduler=asha: loss 9.0000 at step 60", "stopped"),
        ("10.0.0.8 will be taken away; ray.max_preemptions=2 is used up", "pending"),
        ("found /runs/a/ray/stop", "pending"),
        ("SIGTERM", "pending"),
        (None, "pending"),
    ],
)
def test_only_a_rule_ends_a_trial_early_whatever_else_stops_it_has_interrupted_it(
    tmp_path: Path, why: str | None, status: str
) -> None:
    folder, plan = begun(tmp_path / "s", GRID, "sweep.seeds=[0]")
    name, recorder = plan.trials[1].name, Recorder(folder, 1)
    trial = SimpleNamespace(config={"trial": name}, last_result={"outcome": "stopped", "why": why})
    recorder.on_trial_start(0, [], trial)
    recorder.on_trial_complete(0, [], trial)
    record = folder.read(name)
    assert record is not None
    assert (record["status"], record["failures"]) == (status, 0)
    assert str(why) in record["why"]
    assert recorder.interrupted == ({name} if status == "pending" else set())
    assert (recorder.ended, recorder.running) == ([name], set())


@pytest.mark.parametrize("is_final", [True, False])
def test_what_would_fail_the_same_way_again_is_not_tried_again(
    tmp_path: Path, is_final: bool, caplog: pytest.LogCaptureFixture
) -> None:
    folder, plan = begun(tmp_path / "s", GRID, "sweep.seeds=[0]")
    recorder = Recorder(folder, 2)
    planned = plan.trials[:2]
    names = [each.name for each in planned]
    failure: dict[str, Any] = {"outcome": "failed", "why": "diverged", "is_final": is_final}
    for each, last in zip(planned, (failure, {"outcome": "done"}), strict=True):
        finish(folder, each, 2.5)
        trial = SimpleNamespace(config={"trial": each.name}, last_result=last)
        recorder.on_trial_start(0, [], trial)
        recorder.on_trial_complete(0, [], trial)
    assert recorder.hopeless == ({names[0]} if is_final else set())
    assert f"{names[0]}: failed (diverged); 1 of 2" in caplog.text
    assert f"{names[1]}: done (loss 2.5000); 2 of 2" in caplog.text


DEAD = """Failure # 1 (occurred at 2026-01-01_00-00-00)
The actor died unexpectedly before finishing this task.
\tclass_name: ImplicitFunc
\tip: 127.0.0.1
The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR Worker exit \
detail: Worker unexpectedly exits with a connection error code 2. End of file. There are some \
potential root causes. (1) The process is killed by SIGKILL by OOM killer due to high memory usage.
"""


def test_the_reason_of_a_dead_process_is_what_ray_says_of_it(tmp_path: Path) -> None:
    folder, plan = begun(tmp_path / "s", GRID, "sweep.seeds=[0]")
    name, recorder, file = plan.trials[1].name, Recorder(folder, 1), tmp_path / "error.txt"

    def reason_of(trial_file: Path | None) -> str:
        given = None if trial_file is None else str(trial_file)
        trial = SimpleNamespace(config={"trial": name}, error_file=given)
        recorder.on_trial_error(0, [], trial)
        record = folder.read(name)
        assert record is not None
        assert record["status"] == "failed"
        return record["why"]

    file.write_text(DEAD)
    assert reason_of(file) == (
        "its process ended: Worker unexpectedly exits with a connection error code 2. End of file."
    )
    file.write_text("Failure # 1\nray.exceptions.OutOfMemoryError: a node ran low\n")
    assert reason_of(file) == "its process ended: ray.exceptions.OutOfMemoryError: a node ran low"
    assert reason_of(None) == "its process ended: Ray says nothing of it"
    assert "No such file" in reason_of(tmp_path / "none")


class Places:
    """Room for so many trials."""

    def __init__(self, free: int) -> None:
        self.free = free

    def admits(self, name: str) -> bool:
        if self.free == 0:
            return False
        self.free -= 1
        return True

    def leave(self, name: str) -> None:
        self.free += 1


class Controller:
    def get_live_trials(self) -> list[Any]:
        return [SimpleNamespace(status="PENDING")]
