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
from ray_jobs._tune import InOrder, stop_rule
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
    order = InOrder(["a", "b", "c"], lambda: asked[0] if asked else None)
    assert [order.suggest("x"), order.suggest("y")] == [{"trial": "a"}, {"trial": "b"}]
    asked.append("SIGTERM")
    assert order.suggest("z") == order.FINISHED


class Controller:
    def get_live_trials(self) -> list[Any]:
        return [SimpleNamespace(status="PENDING")]
