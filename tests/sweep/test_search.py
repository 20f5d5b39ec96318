"""Searches with Optuna itself: rounds, what a study is told, that the files are all it needs."""

from __future__ import annotations

import json
import math
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from modular_lm.config import SweepConfig, load_config
from modular_lm.config.sweep import SweepSettings, sweep_warnings
from modular_lm.errors import ConfigError
from modular_lm.sweep.dry_run import describe
from modular_lm.sweep.folder import SweepFolder
from modular_lm.sweep.report import write_report
from modular_lm.sweep.search import ROUND, grown
from modular_lm.sweep.space import studies_of, variants_of
from modular_lm.sweep.tpe import Result, suggestion
from modular_lm.sweep.trials import Plan, Trial, plan_sweep
from tests.support import REPO
from tests.sweep.made_sweep import finish, planned

LR = "sweep.params={optim.lr: {loguniform: [1.0e-4, 1.0e-1]}}"
SEARCH = ("sweep.searcher=optuna", "sweep.budget=steps", "sweep.seeds=[0]")
BEST = 3e-3

Loss = Callable[[Trial], float]


def bowl(trial: Trial) -> float:
    """A loss that is lowest at BEST."""
    return 2 + math.log10(trial.arm.values["optim.lr"] / BEST) ** 2


class Search:
    """A sweep whose trials are not trained; a new object is a new command in the same folder."""

    def __init__(self, path: Path, *args: str) -> None:
        self.config, _, self.defined = planned(path, *SEARCH, *args)
        self.folder, self.plan = SweepFolder(path), self.defined

    def grow(self) -> list[Trial]:
        """Those that are new."""
        before = {record["name"] for record in self.folder.trials()}
        self.plan = grown(self.defined, self.folder, self.has_ended)
        self.folder.begin(self.plan, self.config)
        return [trial for trial in self.plan.trials if trial.name not in before]

    def has_ended(self, trial: Trial) -> bool:
        record = self.folder.read(trial.name)
        return record is not None and record["status"] in ("done", "failed", "stopped")

    def rounds(self, loss: Loss) -> Iterator[list[Trial]]:
        """The new trials of each round, which are done afterwards."""
        while (new := self.grow()) or self.plan.unsuggested:
            yield new
            for trial in new:
                if trial.arm.config is not None:
                    finish(self.folder, trial, loss(trial), points=1)

    def suggested(self) -> dict[tuple[str, int], dict[str, Any]]:
        """(study, number) -> values, as the trials' files have them."""
        return {
            (each["study"], each["number"]): each["values"]
            for record in self.folder.trials()
            for each in record["suggestions"]
        }


def test_the_first_half_is_drawn_as_random_does_and_the_rest_comes_in_rounds(
    tmp_path: Path,
) -> None:
    search = Search(tmp_path, LR, "sweep.num_samples=14")
    rounds = [[trial.name for trial in new] for new in search.rounds(bowl)]
    assert [len(names) for names in rounds] == [7, ROUND, 14 - 7 - ROUND]
    random = planned(tmp_path, LR, "sweep.searcher=random", "sweep.num_samples=14")[2]
    drawn = [trial.name for trial in random.trials][:7]
    assert rounds[0] == [f"{name.rsplit('__', 1)[0]}__seed-0" for name in drawn]
    assert search.plan.unsuggested == 0
    assert sorted(search.suggested()) == [("base", number) for number in range(14)]


def test_suggestions_come_nearer_to_what_is_best(tmp_path: Path) -> None:
    search = Search(tmp_path, LR, "sweep.num_samples=26")
    trials = [trial for new in search.rounds(bowl) for trial in new]
    blind, informed = trials[:10], trials[14:]
    mean = [sum(map(bowl, each)) / len(each) for each in (blind, informed)]
    assert mean[1] - 2 < (mean[0] - 2) / 2
    assert all(1e-4 <= trial.arm.values["optim.lr"] <= 1e-1 for trial in trials)


def test_each_arm_has_a_study_of_its_own_and_one_that_nothing_varies_in_has_none(
    tmp_path: Path,
) -> None:
    arms = (
        "sweep.arms={dense: {model.module_seq_len: null}, avg: {model.module_agg: avg}, "
        "sum: {model.module_agg: sum}}"
    )
    params = (
        "sweep.params={optim.lr: {loguniform: [1.0e-4, 1.0e-1], "
        "when: {model.module_agg: [avg, sum]}}}"
    )
    search = Search(tmp_path, arms, params, "model.module_agg=drop", "sweep.num_samples=20")

    def loss(trial: Trial) -> float:
        if trial.arm.name == "dense":
            return 3.0
        best = 3e-4 if trial.arm.name.startswith("avg") else 3e-2
        return 2 + math.log10(trial.arm.values["optim.lr"] / best) ** 2

    rounds = [[trial.arm.name.split("__")[0] for trial in new] for new in search.rounds(loss)]
    assert rounds[0] == ["dense", *["avg"] * 10, *["sum"] * 10]
    assert rounds[1] == ["avg"] * ROUND + ["sum"] * ROUND
    found = search.suggested()
    late = {name: [found[name, n]["optim.lr"] for n in range(14, 20)] for name in ("avg", "sum")}
    assert max(late["avg"]) < 3e-3 < min(late["sum"])
    # The first ones are the same for all.
    assert [found["avg", n] for n in range(10)] == [found["sum", n] for n in range(10)]
    assert {study for study, _ in found} == {"avg", "sum"}


@pytest.mark.parametrize("lost", [[0, 2], [1], [3], [0, 1, 2, 3]])
def test_a_command_that_continues_makes_the_same_suggestions(
    tmp_path: Path, lost: list[int]
) -> None:
    arguments = (LR, "sweep.num_samples=16")
    whole = Search(tmp_path / "whole", *arguments)
    for _ in whole.rounds(bowl):
        pass
    killed = Search(tmp_path / "killed", *arguments)
    for number, new in enumerate(killed.rounds(bowl)):
        if number == 1:  # killed while the trials of this round were being written
            for n in lost:
                shutil.rmtree(killed.folder.run(new[n].name).path)
            break
    # Those that were written may even have ended since.
    for trial in (trial for n, trial in enumerate(new) if n not in lost):
        finish(killed.folder, trial, bowl(trial))
    again = Search(tmp_path / "killed", *arguments)
    assert [trial.name for trial in again.grow()] == [new[n].name for n in lost]
    for trial in again.plan.trials:
        if not again.has_ended(trial):
            finish(again.folder, trial, bowl(trial))
    for _ in Search(tmp_path / "killed", *arguments).rounds(bowl):
        pass
    assert again.suggested() == whole.suggested()


def test_a_round_waits_for_all_seeds_of_the_one_before(tmp_path: Path) -> None:
    search = Search(tmp_path, LR, "sweep.seeds=[0,1]", "sweep.num_samples=8")
    first = search.grow()
    assert [trial.seed for trial in first] == [0] * 4 + [1] * 4
    for trial in first[:-1]:
        finish(search.folder, trial, bowl(trial))
    assert search.grow() == []
    finish(search.folder, first[-1], bowl(first[-1]))
    assert len(search.grow()) == 8
    # A seed that is added later comes first.
    more = Search(tmp_path, LR, "sweep.seeds=[0,1,2]", "sweep.num_samples=12")
    assert {trial.seed for trial in more.grow()} == {2}


def test_more_samples_go_on_from_those_that_were_made(tmp_path: Path) -> None:
    for new in Search(tmp_path, LR, "sweep.num_samples=8").rounds(bowl):
        assert new
    before = Search(tmp_path, LR, "sweep.num_samples=8").suggested()
    more = Search(tmp_path, LR, "sweep.num_samples=16")
    assert [len(new) for new in more.rounds(bowl)] == [4, 4]
    assert before.items() <= more.suggested().items()
    assert len(more.suggested()) == 16


def told(search: Search) -> list[Result]:
    """What Optuna is told of the first round."""
    found: list[Result] = []

    def listen(study: Any, results: list[Result], *rest: Any) -> Any:
        found[:] = found or results
        return suggestion(study, results, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("modular_lm.sweep.search.suggestion", listen)
        search.grow()
    return found


def test_what_a_study_is_told_of_each_end(tmp_path: Path) -> None:
    search = Search(tmp_path, LR, "sweep.seeds=[0,1]", "sweep.num_samples=8")
    first = search.grow()
    by_arm = {arm.name: [t for t in first if t.arm.name == arm.name] for arm in search.plan.arms}
    good, diverged, failed, stopped = by_arm.values()
    for trial, loss in zip([*good, *diverged], [2.0, 2.5, 3.0, math.nan], strict=True):
        finish(search.folder, trial, loss)
    finish(search.folder, failed[0], 1.0)
    search.folder.update(failed[1].name, "failed", "its process ended")
    finish(search.folder, stopped[0], 4.0, points=4)
    search.folder.run(stopped[1].name).create()
    for step, loss in ((50, 6.0), (100, 5.0)):
        line = {"global_step": step, "validation/builtin/nll": loss}
        search.folder.run(stopped[1].name).eval_metrics.append(line)
    search.folder.update(stopped[1].name, "stopped", "sweep.scheduler=asha")
    found = told(search)
    assert [(each.state, each.loss, each.step) for each in found] == [
        ("done", pytest.approx(2.25), None),
        ("done", math.inf, None),
        ("failed", None, None),
        ("stopped", pytest.approx(4.5), 100),
    ]


CONDITIONAL = (
    "sweep.params={optim.name: {choice: [adamw, muon]}, "
    "optim.beta2: {uniform: [0.8, 0.99], when: {optim.name: [muon]}}, "
    "data.sources: {choice: [{builtin: 1}, {builtin: 2}]}, "
    "model.weight_tying: {choice: [true, false]}, "
    "model.module_agg: {grid: [drop, avg]}}"
)


def test_choices_of_any_kind_and_keys_that_act_under_a_condition(tmp_path: Path) -> None:
    search = Search(tmp_path, CONDITIONAL, "sweep.num_samples=16")
    for _ in search.rounds(lambda trial: 3.0 - (trial.arm.values["optim.name"] == "muon")):
        pass
    found = search.suggested()
    assert {study for study, _ in found} == {"module_agg-drop", "module_agg-avg"}
    assert len(found) == 32
    for values in found.values():
        assert ("optim.beta2" in values) == (values["optim.name"] == "muon")
        assert values["data.sources"] in ({"builtin": 1}, {"builtin": 2})
    late = [found["module_agg-avg", n]["optim.name"] for n in range(8, 16)]
    assert late.count("muon") >= 6


def test_keys_that_take_whole_numbers_get_them(tmp_path: Path) -> None:
    params = (
        "sweep.params={optim.warmup: {loguniform: [1, 100]}, optim.spike_window: {uniform: [0, 9]}}"
    )
    search = Search(tmp_path, params, "sweep.num_samples=12")
    for _ in search.rounds(lambda trial: 2.0 + abs(trial.arm.values["optim.warmup"] - 30) / 30):
        pass
    found = search.suggested()
    assert len(found) == 12
    assert {type(value) for each in found.values() for value in each.values()} == {int}
    assert all(1 <= each["optim.warmup"] <= 100 for each in found.values())
    # What is read back is what was suggested.
    assert Search(tmp_path, params, "sweep.num_samples=12").grow() == []


def test_suggestions_that_repeat_others_are_trained_once(tmp_path: Path) -> None:
    params = "sweep.params={model.module_agg: {choice: [avg, mean, sum]}}"
    search = Search(tmp_path, params, "sweep.num_samples=12")
    for _ in search.rounds(lambda trial: 3.0):
        pass
    # mean is another name of avg.
    assert len(search.plan.arms) == 2
    assert search.plan.unsuggested == 0
    assert len(search.suggested()) == 12
    assert Search(tmp_path, params, "sweep.num_samples=12").grow() == []


def test_suggestions_that_no_run_can_take_fail_alone(tmp_path: Path) -> None:
    params = "sweep.params={model.module_n_summary: {choice: [1, 2, 3, 4, 5, 8]}}"
    search = Search(tmp_path, params, "sweep.num_samples=10", "model.module_agg=stack")
    for _ in search.rounds(lambda trial: 3.0):
        pass
    status = {record["arm"]: record["status"] for record in search.folder.trials()}
    assert status.get("module_n_summary-3", "failed") == "failed"
    assert status["module_n_summary-1"] == "done"
    assert len(search.suggested()) == 10


def test_suggestions_that_cannot_spend_the_same_fail_alone(tmp_path: Path) -> None:
    params = "sweep.params={model.ffn_dim_multiplier: {uniform: [1.0, 3.0]}}"
    arguments = ("sweep.budget=flops", "sweep.num_samples=6", "steps=20", "model.multiple_of=8")
    search = Search(tmp_path, params, *arguments, "sweep.search_seed=12")
    for _ in search.rounds(lambda trial: 3.0):
        pass
    why = [record["why"] for record in search.folder.trials()]
    assert len(why) == 6
    assert any("whole steps let" in str(each) for each in why)


@pytest.mark.parametrize(
    "change",
    [
        ("sweep.params={optim.lr: {loguniform: [1.0e-3, 1.0e-1]}}",),
        ("sweep.params={optim.lr: {choice: [1.0e-3, 1.0e-1]}}",),
        (LR, "sweep.search_seed=1"),
    ],
)
def test_what_a_search_began_with_cannot_change(tmp_path: Path, change: tuple[str, ...]) -> None:
    Search(tmp_path, LR).grow()
    with pytest.raises(ConfigError, match="its search was begun otherwise: suggestion 0 of base"):
        Search(tmp_path, *change).grow()


@pytest.mark.parametrize(
    ("params", "keys", "expected"),
    [
        (
            {"optim.lr": {"grid": [1, 2]}},
            {},
            "sweep.searcher=optuna: nothing is drawn; use uniform",
        ),
        ({"optim.lr": {"choice": [1, 2]}}, {"num_samples": 1}, "sweep.num_samples=1: expected at"),
        (
            {
                "model.module_agg": {"choice": ["avg", "sum"]},
                "model.dim": {"grid": [64], "when": {"model.module_agg": ["avg"]}},
            },
            {},
            "sweep.params.model.dim.when: model.module_agg is suggested",
        ),
        ({"ray.num_workers": {"choice": [1, 2]}}, {}, "sweep.params.ray.num_workers.choice: says"),
    ],
)
def test_searches_that_make_no_sense(params: dict, keys: dict[str, Any], expected: str) -> None:
    settings = SweepSettings(searcher="optuna", params=params, **keys)
    with pytest.raises(ConfigError) as raised:
        variants_of(settings, {})
    assert expected in str(raised.value)
    assert "\n" not in str(raised.value)


def test_without_optuna_it_is_said_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ConfigError, match=r"pip install 'modular-lm\[optuna\]'"):
        Search(tmp_path, LR)
    planned(tmp_path, LR, "sweep.searcher=random")


def test_a_dry_run_says_what_is_known_and_that_more_follows(tmp_path: Path) -> None:
    plan: Plan = planned(tmp_path, LR, *SEARCH, "sweep.seeds=[0,1,2]", "sweep.num_samples=10")[2]
    text = describe(plan)
    assert sum(line.startswith("lr-0.0") for line in text.splitlines()) == 5
    assert "these are the first 5 of 10 suggestions of each study; up to 15 trials follow" in text
    assert "sweep.searcher=optuna: the best of many" in sweep_warnings(plan.settings)[0]


def test_the_example_of_the_documentation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPO)
    file = tmp_path / "sweep.yaml"
    text = (REPO / "docs" / "sweeps.md").read_text().split("## Search")[1]
    file.write_text(re.findall(r"```yaml\n(.*?)```", text, re.S)[0])
    plan = plan_sweep(*load_config(SweepConfig, [f"config={file}"]))
    assert [arm.name.split("__")[0] for arm in plan.arms] == ["dense"] * 10 + ["drop"] * 10
    assert all(arm.why is None for arm in plan.arms)
    assert plan.unsuggested == 2 * 14


def test_the_report_says_that_it_was_a_search(tmp_path: Path) -> None:
    search = Search(tmp_path, LR, "sweep.num_samples=6", "sweep.seeds=[0,1,2]")
    for _ in search.rounds(bowl):
        write_report(search.folder)
    assert "p-values do not allow for that" in search.folder.report("md").read_text()
    assert json.loads(search.folder.report("json").read_text())["searcher"] == "optuna"


def test_a_suggestion_depends_on_what_it_is_told_alone() -> None:
    settings = SweepSettings(
        searcher="optuna", params={"optim.lr": {"loguniform": [1e-4, 1e-1]}}, num_samples=8
    )
    (study,) = studies_of(settings, {})
    results = [
        Result({"optim.lr": lr}, "done", loss)
        for lr, loss in ((1e-4, 3.0), (1e-3, 2.0), (1e-2, 2.5), (1e-1, math.inf))
    ]
    more = [*results, Result({"optim.lr": 2e-3}, "running"), Result({"optim.lr": 1e-2}, "failed")]
    swept = study.swept["optim.lr"]
    draws = [suggestion(study, each, 5, 4)("optim.lr", swept) for each in (results, results, more)]
    assert draws[0] == draws[1] != draws[2]
