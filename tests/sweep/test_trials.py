"""Trials: fair budgets, equal parameters, paired seeds, and variants that cannot run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modular_lm.config import SweepConfig, TrainConfig, load_config
from modular_lm.config.checks import flatten, global_batch_size, world_sizes
from modular_lm.config.load import from_dict
from modular_lm.errors import ConfigError
from modular_lm.model.flops import flops_per_token, parameters
from modular_lm.model.memory import memory_estimate
from modular_lm.sweep.budget import check_spread
from modular_lm.sweep.dry_run import describe
from modular_lm.sweep.trials import Plan, plan_sweep
from tests.support import REPO
from tests.sweep.made_sweep import DEBUG, begun, finish, planned

ARMS = (
    "sweep.arms={dense: {model.module_seq_len: null, model.module_agg: drop}, "
    "window: {model.module_seq_len: null, model.module_agg: drop, model.sliding_window: 64}, "
    "drop: {model.module_agg: drop}, avg: {model.module_agg: avg}, "
    "stack: {model.module_agg: stack, model.module_seq_len: 32, model.module_n_summary: 4}}"
)
FOLDER = Path("/nowhere/made")


def plan(*args: str) -> Plan:
    return planned(FOLDER, *args)[2]


def flops_of(each: Plan) -> dict[str, float]:
    """What each trial spends, from what it would be given, by the model's own formula."""
    found = {}
    for trial in each.trials:
        config = from_dict(TrainConfig, trial.given)
        assert trial.arm.config is not None
        tokens = global_batch_size(config, world_sizes(config.ray)[1]) * config.data.seq_len
        per_token = flops_per_token(trial.arm.config.model, config.data.seq_len)
        found[trial.name] = config.steps * tokens * per_token
    return found


def test_trials_of_all_arms_spend_the_same_flops() -> None:
    made = plan(ARMS)
    spent = flops_of(made)
    assert len(spent) == 15
    assert max(spent.values()) / min(spent.values()) <= 1.01
    assert made.baseline == "dense"
    by_arm = {arm.name: arm.steps for arm in made.arms}
    # By default as much as the steps of the config cost the baseline.
    assert by_arm["dense"] == 200
    assert all(steps >= 200 for steps in by_arm.values() if steps)
    assert made.amount == pytest.approx(spent["dense__seed-0"])


@settings(max_examples=25, deadline=None)
@given(
    st.floats(1e13, 1e17),
    st.sampled_from([16, 32, 64, 128, 256]),
    st.sampled_from(["drop", "avg", "sum", "stack"]),
    st.integers(1, 4),
)
def test_any_flops_budget_is_met_within_one_per_cent(
    amount: float, chunk: int, agg: str, layers: int
) -> None:
    arm = f"{{model.module_agg: {agg}, model.module_seq_len: {chunk}, model.n_layers: {layers}}}"
    made = plan(
        f"sweep.arms={{dense: {{model.module_seq_len: null}}, other: {arm}}}",
        f"sweep.amount={amount}",
        "sweep.seeds=[0]",
    )
    for spent in flops_of(made).values():
        assert spent == pytest.approx(amount, rel=0.01)


def test_steps_that_are_too_few_to_be_fair_are_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"sweep.amount: whole steps let .* apart; allowed are 1%"
    ):
        plan(ARMS, "sweep.amount=6e11")
    check_spread({"a": 1000.0, "b": 1009.0}, "flops", 1005.0)
    with pytest.raises(ConfigError, match=r"whole steps let b spend 1011 flops and a 1000, 1.1%"):
        check_spread({"a": 1000.0, "b": 1011.0}, "flops", 1005.0)


def test_steps_that_miss_the_amount_are_refused_also_where_all_miss_it_alike() -> None:
    with pytest.raises(ConfigError, match=r"sweep.amount=10: whole steps let dense spend 8192 tok"):
        plan(ARMS, "sweep.budget=tokens", "sweep.amount=10")
    with pytest.raises(ConfigError, match=r"sweep.amount=1020: whole steps let a spend 1000"):
        check_spread({"a": 1000.0, "b": 1009.0}, "flops", 1020.0)


def test_the_other_budgets() -> None:
    tokens = plan(ARMS, "sweep.budget=tokens", "sweep.amount=1e6")
    assert {arm.steps for arm in tokens.arms} == {round(1e6 / (16 * 512))}
    assert {arm.steps for arm in plan(ARMS, "sweep.budget=steps", "sweep.amount=70").arms} == {70}
    assert {arm.steps for arm in plan(ARMS, "sweep.budget=steps").arms} == {200}


def test_seeds_are_paired_and_come_in_turn() -> None:
    trials = plan(ARMS, "sweep.seeds=[7,3]").trials
    assert [trial.seed for trial in trials] == [7] * 5 + [3] * 5
    assert trials[0].name == "dense__seed-7"
    stack, dense = (flatten(trials[i].given) for i in (9, 5))
    differing = {key for key in stack if stack[key] != dense.get(key)}
    # But for what is swept, the same run; the data follow the seed.
    assert differing == {
        *("model.module_agg", "model.module_seq_len", "model.module_n_summary"),
        *("name", "dump_dir", "steps"),
    }
    assert stack["seed"] == 3
    assert stack["dump_dir"] == str(FOLDER / "trials" / "stack__seed-3")


def test_equal_parameters_by_the_width_of_the_feed_forward() -> None:
    made = plan(ARMS, "sweep.iso_parameters=true")
    counts = {arm.name: arm.cost.parameters for arm in made.arms if arm.cost}
    assert len(counts) == 5
    assert all(count == pytest.approx(counts["dense"], rel=0.01) for count in counts.values())
    widths = {arm.name: arm.cost.ffn_dim for arm in made.arms if arm.cost}
    assert widths["stack"] < widths["dense"] == widths["drop"]
    # And that is what the trials would train.
    stack = next(trial for trial in made.trials if trial.arm.name == "stack")
    config = from_dict(TrainConfig, stack.given)
    assert config.model.ffn_dim_multiplier is not None
    assert stack.arm.config is not None
    assert parameters(stack.arm.config.model).total == counts["stack"]
    assert "model.ffn_dim_multiplier" not in stack.arm.values
    assert max(flops_of(made).values()) / min(flops_of(made).values()) <= 1.01


def test_an_axis_that_a_typo_drops_is_warned_of() -> None:
    lr = "sweep.params={{optim.lr: {{grid: [0.1, 0.2], when: {}}}}}"
    arms = "sweep.arms={a: {model.module_seq_len: 64, optim.warmup: 1}, b: {model.dim: 96}}"
    for when, said in (
        ("{model.module_seq_len: [65]}", "model.module_seq_len is 64, 128, and 65 is asked for"),
        ("{model.module_seq_len: [64], model.dim: [96]}", "and 64 is asked for; model.dim is "),
    ):
        made = plan(arms, lr.format(when))
        (warning,) = made.warnings
        assert warning.startswith("sweep.params.optim.lr.when: holds in no variant, so the key")
        assert said in warning
        assert f"warning: {warning}" in describe(made)
    assert plan(arms, lr.format("{model.module_seq_len: [64]}")).warnings == ()


def test_equal_parameters_divide_among_ranks() -> None:
    split = ("ray.num_workers=2", "distributed.tp_size=2", "model.n_heads=2", "model.multiple_of=8")
    made = plan(ARMS, *split, "sweep.iso_parameters=true")
    assert [arm.why for arm in made.arms] == [None] * 5
    assert all(arm.cost.ffn_dim % 2 == 0 for arm in made.arms if arm.cost)


def test_small_models_get_any_width_that_matches() -> None:
    small = ("model.dim=48", "model.n_layers=4", "model.n_heads=2", "sweep.iso_parameters=true")
    made = plan(ARMS, *small)
    counts = {arm.name: arm.cost.parameters for arm in made.arms if arm.cost}
    assert len(counts) == 5
    assert all(count == pytest.approx(counts["dense"], rel=0.01) for count in counts.values())
    assert any(arm.cost.ffn_dim % 8 for arm in made.arms if arm.cost)


def test_parameters_that_no_width_can_match_fail_alone() -> None:
    made = plan("sweep.arms={dense: {model.module_seq_len: null}, deep: {model.n_layers: 40}}",
                "sweep.iso_parameters=true")  # fmt: skip
    assert made.arms[0].steps == 200
    assert made.arms[1].steps is None
    assert "sweep.iso_parameters" in str(made.arms[1].why)


@pytest.mark.parametrize("key", ["model.ffn_dim_multiplier", "model.multiple_of"])
def test_what_iso_parameters_sets_cannot_vary(key: str) -> None:
    for where in (f"params={{{key}: {{grid: [8, 16]}}}}", f"arms={{a: {{{key}: 8}}, b: {{}}}}"):
        with pytest.raises(ConfigError, match=rf"{key}: sweep.iso_parameters sets"):
            plan(f"sweep.{where}", "sweep.iso_parameters=true")
        plan(f"sweep.{where}")
    plan(ARMS, f"{key}=8", "sweep.iso_parameters=true")


def test_a_variant_that_cannot_run_fails_alone_but_for_the_baseline() -> None:
    args = ("sweep.params={model.module_n_summary: {grid: [1, 3, 4]}}",)
    made = plan(*args)
    assert [arm.why is None for arm in made.arms] == [True, False, True]
    assert "must divide model.module_seq_len=128" in str(made.arms[1].why)
    with pytest.raises(ConfigError, match=r"sweep.baseline=module_n_summary-3: cannot be trained"):
        plan(*args, "sweep.baseline=module_n_summary-3")


def test_a_mesh_that_its_workers_cannot_form_fails_alone() -> None:
    made = plan("sweep.params={distributed.tp_size: {grid: [1, 3]}}", "ray.num_workers=2")
    assert [arm.why is None for arm in made.arms] == [True, False]
    assert "tp_size=3" in str(made.arms[1].why)


def test_two_names_of_one_training_are_one_arm() -> None:
    made = plan("sweep.params={model.module_agg: {grid: [avg, mean, sum]}}")
    assert [arm.name for arm in made.arms] == ["module_agg-avg", "module_agg-sum"]
    kept = plan(
        "sweep.params={model.module_agg: {grid: [avg, mean, sum]}}",
        "sweep.baseline=module_agg-mean",
    )
    assert [arm.name for arm in kept.arms] == ["module_agg-mean", "module_agg-sum"]
    with pytest.raises(ConfigError, match=r"sweep.arms.b: trains the same as sweep.arms.a"):
        plan("sweep.arms={a: {model.module_agg: avg}, b: {model.module_agg: mean}}")


def test_a_baseline_that_is_no_variant() -> None:
    with pytest.raises(ConfigError, match=r"sweep.baseline=dnse: .*; did you mean dense"):
        plan(ARMS, "sweep.baseline=dnse")


def test_trials_are_compared_by_validation_so_there_must_be_one() -> None:
    with pytest.raises(ConfigError, match=r"eval.validation.max_docs=0"):
        plan(ARMS, "eval.validation.max_docs=0")
    varied = "params={eval.validation.max_docs: {grid: [16, 0]}}"
    for where in (varied, "arms={a: {eval.validation.max_docs: 0}, b: {}}"):
        with pytest.raises(ConfigError, match=r"eval.validation.max_docs=0: trials are compared"):
            plan(f"sweep.{where}")


def test_one_variant_is_no_sweep() -> None:
    for where in (
        "params={optim.lr: {grid: [0.1]}}",
        "params={model.module_agg: {grid: [avg, mean]}}",
        "arms={a: {}}",
    ):
        with pytest.raises(ConfigError, match="is the only variant, so there is nothing to compar"):
            plan(f"sweep.{where}")


def test_a_dry_run_says_what_a_step_costs_and_what_the_runs_would_warn_of() -> None:
    made = plan(ARMS[:-1] + ", odd: {model.module_seq_len: null}, late: {optim.warmup: 900}}")
    text = describe(made)
    head, dense = text.splitlines()[:2]
    assert head.split()[1:4] == ["steps", "tokens/step", "tokens"]
    cost = made.arms[0].cost
    assert cost is not None
    assert {f"{cost.tokens_per_step:,}", f"{cost.flops_per_token:.4g}"} <= set(dense.split())
    # Of the fewest workers, who have the most to hold.
    elastic = describe(plan(ARMS, "ray.num_workers=[2,4]")).splitlines()
    assert made.arms[0].config is not None
    need = memory_estimate(made.arms[0].config, 2).total / 2**20
    assert head.split()[-1] == "MiB/worker"
    assert dense.split()[-1] == elastic[1].split()[-1] == f"{need:,.0f}"
    assert "warning: odd: model.module_agg=avg cannot act" in text
    # Of its own number of steps.
    assert (
        f"warning: late: optim.warmup=900 is longer than the run, steps={made.arms[-1].steps}"
        in text
    )


def test_a_base_file_holds_where_the_sweep_sets_nothing(tmp_path: Path) -> None:
    file = tmp_path / "sweep.yaml"
    file.write_text(
        f"name: mine\nsweep:\n  base: {DEBUG}\n"
        "  params:\n    optim.lr: {grid: [1.0e-3, 1.0e-2]}\n"
        "data:\n  seq_len: 256\n  sources: {web: 1.0}\nmodel:\n  dim: 64\n"
    )
    config, given = load_config(SweepConfig, [f"config={file}", "model.n_heads=2"])
    made = plan_sweep(config, given)
    assert made.folder.name == "mine"
    run = from_dict(TrainConfig, made.trials[0].given)
    assert (run.data.seq_len, run.model.dim, run.model.n_heads) == (256, 64, 2)
    assert (run.model.n_layers, run.data.batch_size) == (4, 8)  # of the base
    assert run.data.sources == {"web": 1.0}  # replaced, not merged
    assert run.optim.lr == 1e-3
    config.sweep.base = str(tmp_path / "missing.yaml")
    with pytest.raises(ConfigError, match=r"sweep.base: config=.*no such file"):
        plan_sweep(config, given)


def test_a_dry_run_looks_at_what_its_folder_holds(tmp_path: Path) -> None:
    folder, made = begun(tmp_path / "s", ARMS)
    finish(folder, made.trials[0], 3.0)
    assert "15, 1 of them done" in describe(planned(tmp_path / "s", ARMS)[2])
    with pytest.raises(ConfigError, match=rf"steps: 200 -> .*sweep\.amount={made.amount} gives"):
        describe(planned(tmp_path / "s", ARMS, "steps=300")[2])
    with pytest.raises(ConfigError, match=r"steps: 200 -> 90 \(it had sweep\.budget=flops\)"):
        describe(planned(tmp_path / "s", ARMS, "sweep.budget=steps", "steps=90")[2])


def test_the_example_of_the_documentation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPO)
    file = tmp_path / "sweep.yaml"
    file.write_text(re.findall(r"```yaml\n(.*?)```", Path("docs/sweeps.md").read_text(), re.S)[0])
    made = plan_sweep(*load_config(SweepConfig, [f"config={file}"]))
    assert [arm.name for arm in made.arms] == [
        "dense",
        "window",
        "chunks__module_agg-drop",
        "chunks__module_agg-avg",
        "chunks__module_agg-stack",
    ]
    assert all(arm.why is None for arm in made.arms)
