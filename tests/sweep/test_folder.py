"""A sweep's folder: what may change when the same sweep is started again, and what is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from modular_lm.config import SweepConfig, TrainConfig, load_config
from modular_lm.config.load import from_dict
from modular_lm.errors import ConfigError, DataError
from modular_lm.sweep.folder import SweepFolder
from modular_lm.sweep.summary import summarise
from modular_lm.sweep.trials import plan_sweep
from tests.sweep.made_sweep import DEBUG, begun, finish, finish_all, planned

ARMS = "sweep.arms={dense: {model.module_seq_len: null, model.module_agg: drop}, avg: {}}"
STEPS = "sweep.budget=steps"  # which do not depend on the baseline
MORE = ARMS[:-1] + ", sum: {model.module_agg: sum}}"


def again(folder: SweepFolder, *args: str) -> None:
    config, _, plan = planned(folder.path, *args)
    folder.begin(plan, config)


def test_trials_are_listed_by_arm_and_seed(tmp_path: Path) -> None:
    folder, _ = begun(tmp_path / "s", ARMS, "sweep.seeds=[2,1]")
    assert [(t["arm"], t["seed"], t["status"]) for t in folder.trials()] == [
        ("dense", 1, "pending"),
        ("dense", 2, "pending"),
        ("avg", 1, "pending"),
        ("avg", 2, "pending"),
    ]
    record = json.loads((tmp_path / "s/trials/dense__seed-1/trial.json").read_text())
    assert record["budget"] == "flops"
    assert record["steps"] == 200
    assert record["baseline"] is True
    assert record["given"]["dump_dir"] == str(tmp_path / "s/trials/dense__seed-1")
    assert folder.read_definition()["sweep"]["seeds"] == [2, 1]


def test_a_sweep_that_is_started_again_keeps_what_is_done_and_takes_what_is_new(
    tmp_path: Path,
) -> None:
    folder, _ = begun(tmp_path / "s", ARMS, "sweep.seeds=[0]")
    folder.update("dense__seed-0", "running")
    folder.update("dense__seed-0", "done")
    folder.update("avg__seed-0", "running")
    folder.update("avg__seed-0", "failed", "the disk was full")
    again(folder, MORE, "sweep.seeds=[0,1]", "ray.num_workers=2", "logging.freq=1")
    found = {t["name"]: (t["status"], t["why"], t["attempts"]) for t in folder.trials()}
    assert found["dense__seed-0"] == ("done", None, 1)
    assert found["avg__seed-0"] == ("failed", "the disk was full", 1)
    assert found["sum__seed-1"] == ("pending", None, 0)
    assert len(found) == 6
    # How it is run and reported may change, and does.
    assert folder.trials()[0]["given"]["logging"] == {"freq": 1}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("optim.lr=0.5", "optim.lr: 0.003 -> 0.5"),
        ("data.seq_len=256", "data.seq_len: 512 -> 256"),
        ("model.weight_tying=true", "model.weight_tying: False -> True"),
        ("sweep.amount=5e12", "steps: 200 -> "),
        ("data.sources={builtin: 1, web: 1}", "data.sources.web: not set -> 1.0"),
        ("checkpoint.init_ckpt_path=/a/b", "checkpoint.init_ckpt_path: None -> /a/b"),
        ("ray.num_workers=1 sweep.budget=steps", "data.batch_size, grad_acc_steps, ray.num_work"),
    ],
)
def test_a_trial_cannot_become_another_one(tmp_path: Path, change: str, expected: str) -> None:
    folder, _ = begun(tmp_path / "s", ARMS)
    before = {file: file.read_bytes() for file in sorted(folder.path.rglob("*.*"))}
    with pytest.raises(ConfigError, match="its trial dense__seed-0 was begun otherwise") as raised:
        again(folder, ARMS, *re.split(r" (?=\w+\.)", change))
    assert expected in str(raised.value)
    assert {file: file.read_bytes() for file in sorted(folder.path.rglob("*.*"))} == before


def test_what_says_only_where_and_how_a_trial_runs_may_change(tmp_path: Path) -> None:
    folder, _ = begun(tmp_path / "s", ARMS)
    again(folder, ARMS, "model.weight_tying=false", "optim.beta1=0.9")  # defaults
    again(folder, ARMS, "hang_timeout_s=900", "checkpoint.eval.every=50", "data.loader=local")
    again(folder, ARMS, "data.batch_size=4", "grad_acc_steps=2")
    again(folder, ARMS, "ray.num_workers=1", "grad_acc_steps=2")
    assert {trial["tokens_per_step"] for trial in folder.trials()} == {8192}
    config, given = load_config(SweepConfig, [f"config={folder.definition}"])
    folder.begin(plan_sweep(config, given), config)


def test_what_a_definition_has_no_more_is_kept_and_not_of_the_sweep(tmp_path: Path) -> None:
    folder, plan = begun(tmp_path / "s", MORE, STEPS)
    finish_all(folder, plan, lambda trial: 2.0 + 0.01 * trial.seed + 0.1 * len(trial.arm.name))
    fewer = "sweep.arms={avg: {}, sum: {model.module_agg: sum}}"
    again(folder, fewer, STEPS, "sweep.baseline=sum", "sweep.seeds=[0,1]")
    assert len(folder.trials()) == 4
    found = summarise(folder)
    assert found["baseline"] == "sum"
    arms = {arm["name"]: (arm["baseline"], arm["done"]) for arm in found["arms"]}
    assert arms == {"avg": (False, 2), "sum": (True, 2)}
    assert [r["name"] for r in folder.records() if r["baseline"]] == ["sum__seed-0", "sum__seed-1"]
    again(folder, MORE, STEPS)
    assert {trial["status"] for trial in folder.trials()} == {"done"}
    assert len(folder.trials()) == 9
    assert summarise(folder)["baseline"] == "dense"


def test_the_written_definition_needs_nothing_else(tmp_path: Path) -> None:
    file = tmp_path / "given.yaml"
    file.write_text(
        f"sweep:\n  base: {DEBUG}\n  seeds: [5]\n  params: {{optim.lr: {{grid: [0.01, 0.02]}}}}\n"
        "data: {batch_size: 4}\n"
    )
    config, given = load_config(SweepConfig, [f"config={file}", f"dump_dir={tmp_path / 's'}"])
    plan, folder = plan_sweep(config, given), SweepFolder(tmp_path / "s")
    folder.begin(plan, config)
    again = plan_sweep(*load_config(SweepConfig, [f"config={folder.definition}"]))
    assert (again.baseline, again.amount, again.folder) == (plan.baseline, plan.amount, plan.folder)
    assert [arm.name for arm in again.arms] == [arm.name for arm in plan.arms]
    for mine, other in zip(plan.trials, again.trials, strict=True):
        assert from_dict(TrainConfig, mine.given) == from_dict(TrainConfig, other.given)
    assert from_dict(TrainConfig, again.trials[0].given).model.dim == 128  # of the base


def test_what_cannot_run_is_failed_from_the_beginning(tmp_path: Path) -> None:
    folder, _ = begun(tmp_path / "s", "sweep.params={model.module_n_summary: {grid: [1, 3]}}")
    failed = [trial for trial in folder.trials() if trial["status"] == "failed"]
    assert len(failed) == 3
    assert "must divide model.module_seq_len=128" in failed[0]["why"]


def test_folders_that_hold_no_sweep_or_a_damaged_one(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"expected the folder of a sweep, with sweep.yaml in it"):
        SweepFolder(tmp_path).read_definition()
    folder, _ = begun(tmp_path / "s", ARMS)
    folder.trial_file("avg__seed-0").write_text("{")
    with pytest.raises(DataError, match=r"avg__seed-0/trial.json: expected JSON"):
        folder.trials()
    folder.trial_file("avg__seed-0").write_text("[]")
    with pytest.raises(DataError, match=r"expected a trial's state, and a mapping is not"):
        folder.trials()
    folder.trial_file("avg__seed-0").write_text('{"name": "x"}')
    with pytest.raises(DataError, match=r"avg__seed-0/trial.json: expected a trial's state"):
        folder.trials()


def test_all_that_a_report_reads_is_asked_for(tmp_path: Path) -> None:
    folder, plan = begun(tmp_path / "s", ARMS, "sweep.seeds=[0]")
    finish(folder, plan.trials[0], 3.0)
    whole = folder.trial_file("dense__seed-0").read_text()
    for key in ("baseline", "amount", "tokens_per_step"):
        record = json.loads(whole)
        del record[key]
        folder.trial_file("dense__seed-0").write_text(json.dumps(record))
        with pytest.raises(DataError, match=rf"expected a trial's state, and {key} is not"):
            folder.trials()
    folder.trial_file("dense__seed-0").write_text(whole)
    definition = folder.definition.read_text()
    for text, expected in {
        "name: x\n": "expected the keys of a sweep, and a group `sweep`",
        "name: x\nsweep: {seeds: [0]}\n": "lacks budget, amount, baseline, searcher",
        definition.replace("name: made\n", ""): "lacks name;",
    }.items():
        folder.definition.write_text(text)
        with pytest.raises(DataError, match=expected):
            folder.read_definition()
