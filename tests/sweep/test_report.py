"""Reports of written sweeps: the numbers, what is left out and why, and files that stand alone."""

from __future__ import annotations

import json
import math
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from modular_lm.sweep.folder import SweepFolder
from modular_lm.sweep.report import write_report
from modular_lm.sweep.style import COLOURS, styles_of
from modular_lm.sweep.summary import summarise
from modular_lm.sweep.tables import headline, how_to_read, verdict
from modular_lm.sweep.trials import Plan
from tests.sweep.made_sweep import DOCUMENTS, begun, document_scores, finish, finish_all, write_run

ARMS = (
    "sweep.arms={dense: {model.module_seq_len: null, model.module_agg: drop}, "
    "window: {model.module_seq_len: null, model.module_agg: drop, model.sliding_window: 64}, "
    "avg: {model.module_seq_len: 64}, stack: {model.module_agg: stack, model.module_lookback: 32}, "
    "odd: {model.module_n_summary: 3}}"
)
LOSSES = {
    "dense": [1.50, 1.56, 1.53],
    "window": [1.47, 1.525, 1.502],
    "avg": [1.60, 1.655, 1.63],
    "stack": [1.51, 1.55, 1.56],
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[SweepFolder, Plan]:
    folder, plan = begun(tmp_path_factory.mktemp("made") / "sweep", ARMS)
    finish_all(folder, plan, LOSSES)
    return folder, plan


@pytest.fixture(scope="module")
def summary(made: tuple[SweepFolder, Plan]) -> dict[str, Any]:
    return write_report(made[0])


def arm(summary: dict[str, Any], name: str) -> dict[str, Any]:
    return next(each for each in summary["arms"] if each["name"] == name)


def test_means_intervals_and_paired_tests_are_scipy_s(summary: dict[str, Any]) -> None:
    p_values = {}
    for name, losses in LOSSES.items():
        found = arm(summary, name)
        ends = stats.ttest_1samp(losses, 0.0).confidence_interval(0.95)
        assert found["nll"]["mean"] == pytest.approx(np.mean(losses))
        assert (found["nll"]["low"], found["nll"]["high"]) == pytest.approx(tuple(ends))
        assert found["nll"]["by_seed"] == dict(zip("012", losses, strict=True))
        assert found["bpb"]["mean"] == pytest.approx(np.mean(losses) * 1.4427)
        if name != "dense":
            test = stats.ttest_rel(losses, LOSSES["dense"])
            assert found["difference"]["p"] == pytest.approx(test.pvalue)
            ends = test.confidence_interval(0.95)
            assert found["difference"]["low"] == pytest.approx(ends.low)
            p_values[name] = test.pvalue
    assert arm(summary, "dense")["difference"] is None
    least = min(p_values, key=lambda name: p_values[name])
    assert arm(summary, least)["difference"]["p_holm"] == pytest.approx(3 * p_values[least])


def test_documents_are_compared_within_a_seed(summary: dict[str, Any]) -> None:
    documents = arm(summary, "avg")["documents"]
    assert documents.keys() == {"0", "1", "2"}
    mine, base = document_scores(1.60), document_scores(1.50)
    expected = (np.sum(mine.nll) - np.sum(base.nll)) / np.sum(base.tokens)
    assert documents["0"]["mean"] == pytest.approx(expected)
    assert documents["0"]["n"] == DOCUMENTS
    assert documents["0"]["low"] < expected < documents["0"]["high"]


def test_costs_and_measurements(summary: dict[str, Any], made: tuple[SweepFolder, Plan]) -> None:
    for each in made[1].arms:
        found = arm(summary, each.name)
        if each.cost is None:
            continue
        assert found["parameters"] == each.cost.parameters
        assert found["flops"] == each.steps * each.cost.flops_per_step  # type: ignore[operator]
        assert found["tokens_per_second"] == pytest.approx(2e4 / (1 + len(each.name) % 3), rel=0.1)
        assert found["memory_mib"] == 404.0 + len(each.name)
    assert summary["flops_spread"] <= 0.01
    assert (
        arm(summary, "dense")["cache_bytes_per_token"]
        > 7 * (arm(summary, "avg")["cache_bytes_per_token"])
    )
    # window is better and holds less than all that hold more; avg's chunks of 64 hold a bit more.
    assert {a["name"] for a in summary["arms"] if a["pareto"]} == {"window"}


def test_curves_are_means_of_validation_at_shared_steps(summary: dict[str, Any]) -> None:
    curves = summary["curves"]
    assert curves["what"] == "validation loss"
    assert curves["arms"].keys() == LOSSES.keys()
    dense = curves["arms"]["dense"]
    assert dense["step"] == [20.0 * i for i in range(1, 11)]
    assert dense["mean"][-1] == pytest.approx(np.mean(LOSSES["dense"]))
    assert dense["tokens"][-1] == 200 * 16 * 512
    assert dense["flops"][-1] == arm(summary, "dense")["flops"]
    assert all(a < b for a, b in zip(dense["seconds"], dense["seconds"][1:], strict=False))
    assert dense["low"][-1] == pytest.approx(arm(summary, "dense")["nll"]["low"])


class Tags(HTMLParser):
    """All start tags and their attributes, and whether every element is closed."""

    VOID = frozenset({"meta", "br", "wbr"})

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_whole_and_needs_no_network(
    summary: dict[str, Any], made: tuple[SweepFolder, Plan]
) -> None:
    text = made[0].report("html").read_text()
    tags = Tags()
    tags.feed(text)
    assert tags.open == []
    names = [tag for tag, _ in tags.seen]
    assert names.count("svg") == 5 + 1  # all pictures: two chunk lengths and a window make a map
    assert not {"script", "link", "img", "iframe"} & set(names)
    links = [v for _, a in tags.seen for k, v in a.items() if k in ("href", "src", "xlink:href")]
    assert all(link and link.startswith("#") for link in links)
    assert "url(http" not in text
    assert "@import" not in text
    # Both themes set every colour; the pictures use nothing but these variables.
    assert "prefers-color-scheme: dark" in text
    body = text[text.index("<body>") :]
    for name, (light, dark) in COLOURS.items():
        assert text.count(f"--{name}: {light};") == text.count(f"--{name}: {dark};") == 1
        assert light not in body
    assert set(re.findall(r"var\(--(\w+)\)", text)) <= COLOURS.keys()


def test_pictures_and_markdown_stand_alone(
    summary: dict[str, Any], made: tuple[SweepFolder, Plan]
) -> None:
    folder = made[0]
    text = folder.report("md").read_text()
    pictures = re.findall(r"!\[[^]]+\]\(([^)]+)\)", text)
    assert len(pictures) == 6
    for picture in pictures:
        root = ET.parse(folder.path / picture).getroot()
        assert root.tag.endswith("svg")
    assert "stack" in "".join(ET.parse(folder.pictures / "flops.svg").getroot().itertext())
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert len({line.count("|") for line in rows[:6]}) == 1
    assert rows[2].startswith("| window |")  # the best first
    assert "odd__seed-0 | failed: model.module_n_summary=3: must divide" in text


def test_the_same_folder_gives_the_same_report(
    summary: dict[str, Any], made: tuple[SweepFolder, Plan]
) -> None:
    folder = made[0]
    files = [*sorted(folder.pictures.iterdir()), folder.report("md")]
    before = [file.read_bytes() for file in files]
    (folder.pictures / "earlier.svg").write_text("<svg/>")
    found = write_report(folder)
    assert [file.read_bytes() for file in files] == before
    assert not (folder.pictures / "earlier.svg").exists()
    assert found == {**summary, "created_at": found["created_at"]}
    assert json.loads(folder.report("json").read_text()) == found


# ------------------------------------------------------------------ sweeps that are not whole


def test_trials_without_a_result_are_listed_with_the_reason(tmp_path: Path) -> None:
    folder, plan = begun(tmp_path / "s", ARMS)
    by_name = {trial.name: trial for trial in plan.trials}
    for name in ("dense__seed-0", "dense__seed-1", "dense__seed-2", "avg__seed-0", "avg__seed-1"):
        finish(folder, by_name[name], 1.5)
    finish(folder, by_name["stack__seed-0"], float("nan"))
    folder.update("stack__seed-1", "stopped", "by asha at 30 % of its budget")
    folder.update("avg__seed-2", "failed", "rank 1: out of memory")
    write_run(folder, by_name["window__seed-0"], 1.4)  # half a run: it is not done
    folder.update("window__seed-0", "running")
    summary = write_report(folder)
    why = {each["trial"]: each["why"] for each in summary["excluded"]}
    assert why["stack__seed-0"] == "diverged: its validation loss is nan"
    assert why["stack__seed-1"] == "stopped: by asha at 30 % of its budget"
    assert why["stack__seed-2"] == "pending"
    assert why["avg__seed-2"] == "failed: rank 1: out of memory"
    assert why["window__seed-0"] == "running"
    assert arm(summary, "window")["nll"] is None
    avg = arm(summary, "avg")
    assert (avg["done"], avg["trials"]) == (2, 3)
    assert avg["difference"]["p"] is None  # two seeds
    text = folder.report("html").read_text()
    assert "rank 1: out of memory" in text
    assert "2 of 3" in text


def test_done_without_a_validation_of_the_last_step(tmp_path: Path) -> None:
    folder, plan = begun(tmp_path / "s", ARMS, "sweep.seeds=[0]")
    finish_all(folder, plan, {name: losses[:1] for name, losses in LOSSES.items()})
    (folder.run("avg__seed-0").path / "metrics.eval.jsonl").unlink()
    (folder.run("stack__seed-0").evaluation(200).parent).rename(tmp_path / "gone")
    summary = write_report(folder)
    assert "no validation loss after its last step" in summary["excluded"][0]["why"]
    assert arm(summary, "stack")["documents"] == {}
    assert arm(summary, "stack")["untested"] == "other documents"  # which ones nobody knows
    assert arm(summary, "dense")["nll"]["low"] is None  # one seed has no interval


def test_a_sweep_that_has_just_begun(tmp_path: Path) -> None:
    folder, _ = begun(tmp_path / "s", ARMS)
    summary = write_report(folder)
    assert all(each["nll"] is None for each in summary["arms"])
    assert list(folder.pictures.iterdir()) == []
    assert "No trial is done yet." in folder.report("html").read_text()


def test_p_values_are_corrected_for_all_variants_that_were_planned(tmp_path: Path) -> None:
    folder, plan = begun(tmp_path / "s", ARMS)
    for trial in plan.trials:
        if trial.arm.name in ("dense", "window"):
            finish(folder, trial, LOSSES[trial.arm.name][trial.seed])
    folder.update("avg__seed-0", "failed", "rank 1: out of memory")  # stack has not begun
    found = arm(summarise(folder), "window")["difference"]
    p = stats.ttest_rel(LOSSES["window"], LOSSES["dense"]).pvalue
    assert found["p"] == pytest.approx(p)
    assert found["p_holm"] == pytest.approx(3 * p)  # odd cannot be trained: it was never planned


def test_p_values_are_corrected_for_what_a_search_will_suggest(tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    folder, plan = begun(
        tmp_path / "s",
        "sweep.arms={dense: {model.module_seq_len: null, model.module_agg: drop}, avg: {}}",
        "sweep.params={optim.lr: {loguniform: [1.0e-4, 1.0e-2], "
        "when: {model.module_seq_len: [128]}}}",
        "sweep.searcher=optuna",
        "sweep.num_samples=8",
    )
    assert plan.unsuggested == 4
    first = next(each.name for each in plan.arms if each.name != "dense")
    for trial in plan.trials:
        if trial.arm.name in ("dense", first):
            losses = LOSSES["dense" if trial.arm.name == "dense" else "window"]
            finish(folder, trial, losses[trial.seed])
    found = arm(summarise(folder), first)["difference"]
    assert found["p_holm"] == pytest.approx(min(1.0, 8 * found["p"]))


def test_a_variant_that_lost_seeds_has_no_verdict_and_no_first_place(tmp_path: Path) -> None:
    folder, plan = begun(tmp_path / "s", ARMS, "sweep.seeds=[0,1,2,3,4]")
    noise = [0.0, 0.003, -0.002, 0.001, 0.002]
    offsets = {"dense": 0.0, "window": -0.01, "avg": -0.3, "stack": 0.1}
    for trial in plan.trials:
        if trial.arm.why is None:
            loss = 1.5 + 0.02 * trial.seed + offsets[trial.arm.name]
            loss += noise[trial.seed] * (trial.arm.name != "dense")
            lost = trial.arm.name == "avg" and trial.seed >= 3  # the best, where it did not diverge
            finish(folder, trial, math.nan if lost else loss)
    summary = write_report(folder)
    avg = arm(summary, "avg")
    assert avg["difference"]["n"] == 3
    assert avg["difference"]["p"] is avg["difference"]["p_holm"] is None
    assert (avg["untested"], verdict(avg)) == ("seeds missing", "seeds missing")
    assert not avg["pareto"]
    ranks = {each["name"]: each["rank"] for each in summary["arms"]}
    assert ranks == {"window": 1, "dense": 2, "stack": 3, "avg": 4, "odd": None}
    assert verdict(arm(summary, "window")) == "better"
    assert "20 of 25 trials are done (2 without a loss)" in headline(summary)
    assert "2 diverged, 5 failed" in "".join(how_to_read(summary))
    assert styles_of(summary["arms"])["avg"]["markerfacecolor"] == COLOURS["paper"][0]
    assert "1.220*" in folder.pictures.joinpath("heat_map.svg").read_text()


def test_no_verdicts_against_a_baseline_that_lost_a_seed(tmp_path: Path) -> None:
    folder, plan = begun(tmp_path / "s", ARMS, "sweep.seeds=[0,1,2,3]")
    for trial in plan.trials:
        if trial.arm.why is None:
            lost = trial.arm.name == "dense" and trial.seed == 0
            finish(folder, trial, math.nan if lost else 1.5 + 0.01 * trial.seed**2)
    summary = summarise(folder)
    found = [arm(summary, name) for name in ("window", "avg", "stack")]
    assert {each["untested"] for each in found} == {"seeds missing"}
    assert {each["difference"]["n"] for each in found} == {3}


def test_losses_of_other_documents_are_not_compared(tmp_path: Path) -> None:
    folder, plan = begun(tmp_path / "s", ARMS)
    finish_all(folder, plan, LOSSES)
    for trial in plan.trials:
        if trial.arm.name == "window":  # as another seq_len or tokenizer leaves them
            file = folder.run(trial.name).documents_file(trial.arm.steps or 0)
            scores = json.loads(file.read_text())
            scores["sources"]["builtin"]["tokens"][0] += 1
            file.write_text(json.dumps(scores))
    summary = write_report(folder)
    window = arm(summary, "window")
    assert (window["difference"], window["documents"]) == (None, {})
    assert (window["comparable"], verdict(window)) == (False, "other documents")
    assert window["rank"] == 4  # its loss is the lowest
    assert not window["pareto"]
    assert summary["curves"]["arms"].keys() == {"dense", "avg", "stack"}
    for picture in folder.pictures.iterdir():
        assert ">window<" not in picture.read_text()
    assert arm(summary, "avg")["difference"]["p"] is not None
    assert "Other documents:" in "".join(how_to_read(summary))


def test_few_validations_are_no_curve_so_the_training_loss_is_drawn(tmp_path: Path) -> None:
    folder, plan = begun(tmp_path / "s", ARMS, "sweep.seeds=[0,1]")
    for trial in plan.trials:
        if trial.arm.why is None:
            finish(folder, trial, LOSSES[trial.arm.name][trial.seed], points=1)
    curves = write_report(folder)["curves"]
    assert curves["what"] == "training loss"
    assert len(curves["arms"]["dense"]["step"]) == 40


def test_many_arms_are_drawn_in_grey_but_for_the_baseline_and_the_best(tmp_path: Path) -> None:
    grid = (
        "sweep.params={model.module_agg: {grid: [drop, avg, sum, stack]}, "
        "model.module_seq_len: {grid: [32, 64, 128]}}"
    )
    folder, plan = begun(tmp_path / "s", grid, "sweep.seeds=[0]")
    finish_all(folder, plan, lambda trial: 1.5 + 0.01 * len(trial.name))
    write_report(folder)
    words = "".join(ET.parse(folder.pictures / "flops.svg").getroot().itertext())
    assert "4 others" in words
    heat = "".join(ET.parse(folder.pictures / "heat_map.svg").getroot().itertext())
    assert all(word in heat for word in ("drop", "stack", "32", "128"))
