"""Budgets of seconds: what a pilot runs, who shares it, and that it is measured once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from modular_lm.config import TrainConfig
from modular_lm.config.checks import resolve
from modular_lm.config.load import from_dict
from modular_lm.config.sweep import SweepSettings, check_sweep, sweep_warnings
from modular_lm.errors import ConfigError, RunFailedError
from modular_lm.sweep.dry_run import describe
from modular_lm.sweep.folder import SweepFolder
from modular_lm.sweep.pilots import (
    PILOT_STEPS,
    pilot_given,
    seconds_per_step,
    unmeasured,
    with_seconds,
)
from modular_lm.sweep.report import write_report
from modular_lm.sweep.tables import headline
from modular_lm.sweep.trials import Plan
from tests.sweep.made_sweep import finish, planned

ARMS = "sweep.arms={dense: {model.module_seq_len: null}, avg: {model.module_agg: avg}}"
WALL = (ARMS, "sweep.budget=wall", "sweep.amount=60")
RATES = "sweep.arms.low={model.module_seq_len: null, optim.lr: 1.0e-5}"


def grown(path: Path, *args: str) -> Plan:
    """As a command does it: the plan with what is known, and the folder that holds it."""
    config, _, plan = planned(path, *WALL, *args)
    folder = SweepFolder(path)
    plan = with_seconds(plan)
    folder.begin(plan, config)
    return plan


def steps_of(plan: Plan) -> dict[str, int | None]:
    return {arm.name: arm.steps for arm in plan.arms}


def to_come(plan: Plan) -> list[list[str]]:
    return [[arm.name for arm in arms] for arms in unmeasured(plan)]


def test_steps_are_the_seconds_over_those_of_a_step_and_stay(tmp_path: Path) -> None:
    folder = SweepFolder(tmp_path)
    assert to_come(grown(tmp_path)) == [["dense"], ["avg"]]
    folder.measured("dense", 0.25)
    plan = grown(tmp_path)
    assert steps_of(plan) == {"dense": 240, "avg": None}
    assert to_come(plan) == [["avg"]]
    folder.measured("avg", 7.0)
    # Without a rule of 1 %: the seconds of a step are not known so well.
    assert steps_of(grown(tmp_path)) == {"dense": 240, "avg": 9}
    # Other seeds, and how it is run, change nothing.
    plan = grown(tmp_path, "sweep.seeds=[7,0]", "logging.freq=1", "ray.num_workers=1",
                 "data.batch_size=16")  # fmt: skip
    assert {trial.name: trial.given["steps"] for trial in plan.trials} == {
        "dense__seed-7": 240, "avg__seed-7": 9, "dense__seed-0": 240, "avg__seed-0": 9
    }  # fmt: skip
    assert {record["steps"] for record in folder.records()} == {240, 9}
    for changed in ("optim.lr=0.5", "sweep.amount=90", "sweep.budget=steps"):
        with pytest.raises(ConfigError, match="was begun otherwise"):
            grown(tmp_path, changed)


def test_what_another_model_took_says_nothing(tmp_path: Path) -> None:
    grown(tmp_path, "sweep.seeds=[0]")
    SweepFolder(tmp_path).measured("dense", 0.25)
    assert steps_of(grown(tmp_path, "sweep.seeds=[1]"))["dense"] == 240
    other = "sweep.arms.dense={model.module_seq_len: null, model.n_layers: 3}"
    assert steps_of(grown(tmp_path / ".", other, "sweep.seeds=[2]"))["dense"] is None


def test_seconds_are_those_of_so_many_workers(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot be with ray\.num_workers=\[1,2\]"):
        planned(tmp_path, *WALL, "ray.num_workers=[1,2]")


def test_variants_that_take_the_same_time_share_a_pilot(tmp_path: Path) -> None:
    muon = "sweep.arms.muon={model.module_seq_len: null, optim.name: muon}"
    odd = "sweep.arms.odd={model.module_n_summary: 3}"
    assert to_come(grown(tmp_path, RATES, muon, odd)) == [["dense", "low"], ["avg"], ["muon"]]
    SweepFolder(tmp_path).measured("dense", 0.5)
    later = "sweep.arms.late={model.module_seq_len: null, optim.weight_decay: 0.0}"
    plan = grown(tmp_path, RATES, muon, odd, later)
    assert steps_of(plan) == {
        "dense": 120, "avg": None, "low": 120, "muon": None, "odd": None, "late": 120
    }  # fmt: skip
    # From then on it is its own.
    alone = "sweep.arms={low: {model.module_seq_len: null, optim.lr: 1.0e-5}, high: {optim.lr: 1}}"
    assert steps_of(grown(tmp_path, alone)) == {"low": 120, "high": None}


def test_a_pilot_is_the_trial_cut_short_and_leaves_nothing(tmp_path: Path) -> None:
    _, _, plan = planned(tmp_path, *WALL, "checkpoint.path=s3://bucket/x", "logging.freq=50")
    config = from_dict(TrainConfig, pilot_given(plan, plan.arms[1]))
    resolve(config, 257)
    assert (config.steps, config.stop_at) == (200, PILOT_STEPS)
    assert config.dump_dir == str(tmp_path / "pilots" / "avg")
    assert (config.checkpoint.path, config.checkpoint.dump.every) == (None, 0)
    assert (config.checkpoint.eval.every, config.checkpoint.rolling.minutes) == (0, 0)
    assert config.eval.validation.max_docs == 0
    assert config.logging.freq == 5
    assert not config.logging.mlflow.enabled
    trial = from_dict(TrainConfig, plan.trials[1].given)
    assert (config.model, config.data, config.optim) == (trial.model, trial.data, trial.optim)
    assert config.seed == trial.seed
    short = planned(tmp_path, *WALL, "steps=4", "logging.freq=2")[2]
    config = from_dict(TrainConfig, pilot_given(short, short.arms[0]))
    assert (config.steps, config.logging.freq) == (PILOT_STEPS, 2)


def test_the_median_of_the_warm_steps(tmp_path: Path) -> None:
    run = SweepFolder(tmp_path).pilot("dense")
    run.create()
    with pytest.raises(RunFailedError, match="a pilot without metrics"):
        seconds_per_step(run)
    for step, seconds in ((5, 9.0), (10, 2.0), (15, 0.5), (20, 0.4), (25, 0.6), (30, 4.0)):
        run.metrics.append({"global_step": step, "speed/curr_iter_time": seconds})
    assert seconds_per_step(run) == (pytest.approx(0.55), 0.4, 4.0)


def test_the_report_says_what_the_trials_took_and_counts_those_without_a_pilot(
    tmp_path: Path,
) -> None:
    folder = SweepFolder(tmp_path)
    grown(tmp_path, RATES)
    folder.measured("dense", 0.5)
    plan = grown(tmp_path, RATES)
    for trial in plan.trials:
        if trial.arm.name == "avg":
            folder.update(trial.name, "failed", "its pilot: no more memory")
        else:
            loss = 1.5 + 0.01 * (trial.seed**2 if trial.arm.name == "low" else trial.seed)
            finish(folder, trial, loss)
    summary = write_report(folder)
    dense, avg, low = summary["arms"]
    took = [each["seconds"] for each in (dense, low)]
    assert took == [pytest.approx(120 * 1e-6 * 512 * x) for x in (1.5, 1.3)]
    assert (
        "Each may spend 60 seconds of training, by pilots; the variants took "
        f"{min(took):,.4g} to {max(took):,.4g}"
    ) in headline(summary)
    assert avg["seconds"] is None
    # Both were planned, so both count for the correction.
    assert low["difference"]["p_holm"] == pytest.approx(min(1.0, 2 * low["difference"]["p"]))


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({}, "sweep.amount: is required with sweep.budget=wall"),
        ({"amount": 60.0, "searcher": "optuna"}, "sweep.budget=wall: cannot be with"),
    ],
)
def test_what_seconds_cannot_be_with(keys: dict, expected: str) -> None:
    params = {"optim.lr": {"choice": [1e-3, 1e-2]}}
    with pytest.raises(ConfigError) as raised:
        check_sweep(SweepSettings(budget="wall", params=params, **keys))
    assert expected in str(raised.value)


def test_a_dry_run_says_where_steps_come_from_and_has_those_that_are_known(tmp_path: Path) -> None:
    args = (RATES, "sweep.arms.odd={model.module_n_summary: 3}", "eval.validation.chunk_len=512",
            "optim.warmup=900")  # fmt: skip
    plan = grown(tmp_path, *args)
    text = describe(plan)
    assert "follow from pilots of 50 steps; 2 are to come" in text
    assert "60 seconds of training" in text
    assert "the fair budget is flops" in text
    assert "warning: dense, avg, low: eval.validation.chunk_len=512" in text
    assert "optim.warmup" not in text
    SweepFolder(tmp_path).measured("dense", 0.5)
    lines = [line.split() for line in describe(grown(tmp_path, *args)).splitlines()]
    assert [line[1] for line in lines[1:4]] == ["120", "?", "120"]
    SweepFolder(tmp_path).measured("avg", 0.5)
    text = describe(grown(tmp_path, *args))
    assert "pilots of" not in text
    assert "warning: dense, avg: optim.warmup=900 is longer than the run, steps=120" in text
    assert sweep_warnings(replace(plan.settings, budget="flops")) == []
