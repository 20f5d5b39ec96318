"""What a command of a sweep still has to do, without a Ray to do it on."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from modular_lm.errors import EXIT_DONE, EXIT_FAILED, EXIT_STOPPED, RunFailedError
from modular_lm.sweep import report
from modular_lm.sweep.trials import Arm, Plan
from modular_lm.tracking.run_folder import RunFolder
from ray_jobs._tune import Recorder
from ray_jobs.sweep import Sweep
from tests.sweep.made_sweep import finish, planned

ARMS = "sweep.arms={dense: {model.module_seq_len: null, model.module_agg: drop}, avg: {}}"
FEW = (ARMS, "sweep.seeds=[0]", "logging.mlflow.enabled=false")
AVG, DENSE = "avg__seed-0", "dense__seed-0"


def command(path: Path, *args: str) -> Sweep:
    """A command of the sweep that has begun."""
    config, _, plan = planned(path, *FEW, *args)
    sweep = Sweep(plan, config)
    sweep.grow()
    return sweep


def due(sweep: Sweep) -> list[str]:
    return [trial.name for trial in sweep.due()]


def fail(sweep: Sweep, name: str) -> None:
    sweep.folder.update(name, "running")
    sweep.folder.update(name, "failed", "the disk is full; run the same command again")


def test_each_command_has_the_retries_anew(tmp_path: Path) -> None:
    first = command(tmp_path / "s", "sweep.retries=1")
    finish(first.folder, first.plan.trials[0], 3.0)
    fail(first, AVG)
    assert due(first) == [AVG]
    fail(first, AVG)
    assert due(first) == []
    assert not first.is_unfinished()
    assert first.finish() == EXIT_FAILED

    second = command(tmp_path / "s", "sweep.retries=1")
    assert due(second) == [AVG]
    fail(second, AVG)
    assert due(second) == [AVG]
    finish(second.folder, second.plan.trials[1], 3.0)
    assert not second.is_unfinished()
    assert second.finish() == EXIT_DONE

    once = command(tmp_path / "t", "sweep.retries=0")
    fail(once, AVG)
    assert due(once) == [DENSE]
    assert due(command(tmp_path / "t", "sweep.retries=0")) == [DENSE, AVG]


def test_an_interrupted_trial_waits_for_the_next_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = command(tmp_path / "s")
    finish(sweep.folder, sweep.plan.trials[0], 3.0)
    recorder = Recorder(sweep.folder, 2)
    why = "ray.max_preemptions=2 is used up"
    trial = SimpleNamespace(config={"trial": AVG}, last_result={"outcome": "stopped", "why": why})
    recorder.on_trial_start(0, [], trial)
    recorder.on_trial_complete(0, [], trial)
    sweep.settle([DENSE, AVG], recorder)
    assert due(sweep) == []
    assert sweep.finish() == EXIT_STOPPED
    said = capsys.readouterr().out
    assert "stopped (trials were interrupted); the same command continues" in said
    assert "avg__seed-0: interrupted (ray.max_preemptions=2 is used up)" in said
    assert due(command(tmp_path / "s")) == [AVG]


def test_pilots_that_fail_or_are_stopped_leave_the_others_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray_jobs import _pilots

    ends = {"dense": 0.5, "avg": RunFailedError("a worker died"), "deep": None, "odd": KeyError(1)}
    ran: list[str] = []

    def pilot(plan: Plan, arm: Arm, requests: RunFolder) -> float | None:
        ran.append(arm.name)
        end = ends[arm.name]
        if isinstance(end, Exception):
            raise end
        return end

    monkeypatch.setattr(_pilots, "run_pilot", pilot)
    arms = (
        "sweep.arms={dense: {model.module_seq_len: null, model.module_agg: drop}, avg: {}, "
        "deep: {model.n_layers: 6}, odd: {model.dim: 96}}"
    )
    wall = ("sweep.budget=wall", "sweep.amount=60", arms)
    sweep = command(tmp_path / "s", *wall)
    assert due(sweep) == [f"{name}__seed-0" for name in ends]
    sweep.measure()
    assert ran == list(ends)
    assert due(sweep) == [DENSE]
    assert sweep.plan.trials[0].given["steps"] == 120
    whys = {name: (sweep.folder.read(f"{name}__seed-0") or {})["why"] for name in ends}
    assert whys["avg"] == "its pilot: a worker died"
    assert whys["deep"] == "its pilot was stopped; the same command continues"
    assert str(whys["odd"]).startswith("its pilot: ")
    finish(sweep.folder, sweep.plan.trials[0], 3.0)
    assert sweep.finish() == EXIT_STOPPED

    # The next command has all of them again, but for what was measured.
    again, ran[:] = command(tmp_path / "s", *wall), []
    again.requests.request_stop("SIGTERM")
    again.measure()
    assert ran == []
    again.requests.clear_stop()
    again.measure()
    assert ran == ["avg", "deep", "odd"]


def test_a_round_leaves_no_trial_without_an_end(tmp_path: Path) -> None:
    sweep = command(tmp_path / "s")
    sweep.folder.update(AVG, "running")
    sweep.settle([AVG], Recorder(sweep.folder, 1))
    record = sweep.folder.read(AVG)
    assert record is not None
    assert record["why"] == "Ray Tune ended without a result of it"


def test_reports_on_the_way_are_few_and_one_that_fails_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    sweep, tries = command(tmp_path / "s"), list[int]()

    def broken(folder: object) -> None:
        tries.append(1)
        raise KeyError("baseline")

    monkeypatch.setattr(report, "write_report", broken)
    sweep.attend([DENSE], {AVG})
    sweep.attend([DENSE, AVG], set())
    assert len(tries) == 1
    assert [record.message for record in caplog.records] == ["no report: KeyError: 'baseline'"]
    # A stop is passed on whatever the reports do.
    sweep.requests.request_stop("SIGTERM")
    sweep.attend([DENSE, AVG], {AVG})
    assert sweep.folder.run(AVG).stop_requested() == "SIGTERM"
