"""Variants: a pure function of the definition, with conditions, draws and names."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modular_lm.config.sweep import SweepSettings, check_sweep, named_arms, sweep_warnings
from modular_lm.errors import ConfigError
from modular_lm.sweep.space import Variant, variants_of


def expand(
    params: dict[str, Any], base: dict[str, Any] | None = None, **keys: Any
) -> list[Variant]:
    return variants_of(SweepSettings(params=params, **keys), base or {})


def names(variants: list[Variant]) -> list[str]:
    return [each.name for each in variants]


def test_grids_are_crossed_in_the_order_of_the_definition() -> None:
    found = expand(
        {"model.module_agg": {"grid": ["avg", "sum"]}, "optim.lr": {"grid": [1e-3, 0.1]}}
    )
    assert names(found) == [
        "module_agg-avg__lr-0.001",
        "module_agg-avg__lr-0.1",
        "module_agg-sum__lr-0.001",
        "module_agg-sum__lr-0.1",
    ]
    assert found[2].values == {"model.module_agg": "sum", "optim.lr": 0.001}


CONDITIONAL: dict[str, Any] = {
    "model.module_seq_len": {"grid": [64, 128], "when": {"model.module_agg": ["avg", "stack"]}},
    "model.module_agg": {"grid": ["drop", "avg"]},
    "model.module_n_summary": {"grid": [1, 4], "when": {"model.module_seq_len": [128]}},
}


def test_a_key_varies_only_where_its_condition_holds() -> None:
    found = expand(CONDITIONAL)
    assert names(found) == [
        "module_agg-drop",
        "module_agg-avg__module_seq_len-64",
        "module_agg-avg__module_seq_len-128__module_n_summary-1",
        "module_agg-avg__module_seq_len-128__module_n_summary-4",
    ]
    assert "model.module_seq_len" not in found[0].values


def test_a_condition_looks_at_the_base_and_at_arms_too() -> None:
    params = {"model.module_lookback": {"grid": [0, 16], "when": {"model.module_seq_len": [64]}}}
    assert len(expand(params, {"model": {"module_seq_len": 64}})) == 2
    assert len(expand(params)) == 1
    arms = {"dense": {"model.module_seq_len": None}, "chunks": {"model.module_seq_len": 64}}
    found = expand(params, arms=arms)
    assert names(found) == ["dense", "chunks__module_lookback-0", "chunks__module_lookback-16"]
    assert found[2].values == {"model.module_seq_len": 64, "model.module_lookback": 16}


def test_keys_may_be_nested_as_the_command_line_nests_them() -> None:
    dotted = expand({"optim.lr": {"grid": [1e-3]}, "model.dim": {"grid": [32, 64]}})
    nested = expand({"optim": {"lr": {"grid": [1e-3]}}, "model": {"dim": {"grid": [32, 64]}}})
    assert dotted == nested
    settings = SweepSettings(
        arms={"a": {"model": {"dim": 64}, "data.sources": {"web": 1.0}, "optim.lr": 1e-3}}
    )
    # A value that is itself a mapping stays one.
    assert named_arms(settings)["a"] == {
        "model.dim": 64,
        "data.sources": {"web": 1.0},
        "optim.lr": 1e-3,
    }


@settings(deadline=None)
@given(st.integers(0, 9), st.integers(1, 6))
def test_draws_depend_on_the_seed_and_their_key_alone(seed: int, n: int) -> None:
    lr = {"optim.lr": {"loguniform": [1e-4, 1e-2]}}
    more = {**lr, "optim.beta2": {"uniform": [0.9, 0.99]}, "optim.warmup": {"choice": [1, 10]}}
    keys: dict[str, Any] = {"searcher": "random", "search_seed": seed, "num_samples": n}
    alone, together = expand(lr, **keys), expand(more, **keys)
    assert [e.values["optim.lr"] for e in together] == [e.values["optim.lr"] for e in alone]
    assert together == expand(more, **keys)
    for each in together:
        assert 1e-4 <= each.values["optim.lr"] <= 1e-2
        assert 0.9 <= each.values["optim.beta2"] <= 0.99
        assert each.values["optim.warmup"] in (1, 10)


def test_every_point_of_a_grid_gets_the_same_draws() -> None:
    params = {
        "model.module_agg": {"grid": ["avg", "sum"]},
        "optim.lr": {"loguniform": [1e-4, 1e-2]},
    }
    found = expand(params, searcher="random", num_samples=5)
    drawn = {
        agg: [e.values["optim.lr"] for e in found if e.values["model.module_agg"] == agg]
        for agg in ("avg", "sum")
    }
    assert drawn["avg"] == drawn["sum"]
    assert len(set(drawn["avg"])) == 5


def test_equal_values_are_one_variant_and_equal_names_are_not() -> None:
    assert len(expand({"optim.lr": {"grid": [1e-3, 0.001, 1e-2]}})) == 2
    long = [f"runs/{'x' * 150}{end}" for end in "ab"]
    found = expand({"checkpoint.init_ckpt_path": {"grid": ["a/b", "a-b", *long]}})
    assert len(set(names(found))) == 4
    assert all(len(name) <= 140 and "/" not in name for name in names(found))


def test_keys_that_end_the_same_are_named_in_full() -> None:
    found = expand({"checkpoint.dump.every": {"grid": [5]}, "checkpoint.eval.every": {"grid": [7]}})
    assert names(found) == ["checkpoint.dump.every-5__checkpoint.eval.every-7"]


@pytest.mark.parametrize("kind", ["uniform", "loguniform"])
def test_keys_that_take_whole_numbers_get_them(kind: str) -> None:
    params = {"optim.warmup": {kind: [1, 4]}, "optim.lr_multipliers.aggs": {kind: [1, 4]}}
    found = expand(params, searcher="random", num_samples=200)
    warmups = [e.values["optim.warmup"] for e in found]
    assert {type(value) for value in warmups} == {int}
    assert set(warmups) == {1, 2, 3, 4}
    if kind == "uniform":  # the ends as often as others
        assert 30 < warmups.count(1) < 70
        assert 30 < warmups.count(4) < 70
    assert len({e.values["optim.lr_multipliers.aggs"] for e in found}) > 100
    assert found[0].name.startswith(f"warmup-{warmups[0]}__aggs-")


def test_conditions_may_be_nested_as_the_command_line_nests_them() -> None:
    when = {"model": {"module_seq_len": [64, None]}, "data.tokenizer.name": ["bytes"]}
    params = {"optim.lr": {"grid": [0.1, 0.2], "when": when}}
    assert len(expand(params)) == 2
    arms = {"a": {"model.module_seq_len": 32}, "b": {"model.module_seq_len": 64}}
    assert len(expand(params, arms=arms)) == 3


GRID = {"grid": [64]}
RANDOM = {"searcher": "random"}
INF = float("inf")


@pytest.mark.parametrize(
    ("params", "keys", "expected"),
    [
        ({"modle.dim": GRID}, {}, "unknown key sweep.params.modle: did you mean"),
        ({"model.dmi": GRID}, {}, "sweep.params.model.dmi: did you mean sweep.params.model.dim?"),
        ({"model.dim": {"grid": [64, 0]}}, {}, "sweep.params.model.dim=0: expected a number >= 1"),
        ({"model.dim": {"grid": ["big"]}}, {}, "sweep.params.model.dim='big': expected a whole"),
        ({"model.dim": {"grid": []}}, {}, "sweep.params.model.dim.grid=[]: expected at least one"),
        ({"model.dim": 64}, {}, "sweep.params.model.dim=64: expected how it varies"),
        ({"model.dim": {"gird": [64]}}, {}, "sweep.params.model.dim.gird"),
        ({"model.dim": {"grid": [1], "choice": [1]}}, {}, "found grid and choice"),
        ({"model.dim": {"when": {"model.dim": [1]}}}, {}, "found none"),
        ({"optim.lr": {"loguniform": [0, 1]}}, {"searcher": "random"}, "expected numbers > 0"),
        ({"optim.lr": {"uniform": [1, 0]}}, {"searcher": "random"}, "the smaller one first"),
        ({"optim.lr": {"uniform": [0, 1]}}, {}, "sweep.params.optim.lr.uniform: is drawn"),
        ({"seed": {"grid": [1]}}, {}, "sweep.params.seed: cannot be swept: list the seeds in"),
        ({"steps": {"grid": [1]}}, {}, "sweep.params.steps: cannot be swept"),
        ({"model.dim": {**GRID, "when": {"model.agg": [1]}}}, {}, "sweep.params.model.dim.when."),
        ({"model.dim": {**GRID, "when": {"model.dim": [1]}}}, {}, "goes in a circle"),
        (
            {"model.dim": {**GRID, "when": {"model.module_agg": ["stak"]}}},
            {},
            "sweep.params.model.dim.when.model.module_agg=stak: expected one of",
        ),
        ({"model.dim": {**GRID, "when": {"optim.lr": []}}}, {}, "when.optim.lr=[]: expected at"),
        ({"model.dim": {}}, {}, "sweep.params.model.dim: expected exactly one of"),
        ({"optim": {}}, {}, "sweep.params.optim: expected exactly one of"),
        ({"optim": {"grid": [{"lr": 1}]}}, {}, "sweep.params.optim: expected a key"),
        ({}, {"arms": {"a": {"model": None}}}, "sweep.arms.a.model: expected a key"),
        ({"optim.lr": {"uniform": [1, INF]}}, RANDOM, "expected two finite numbers"),
        ({"optim.lr": {"loguniform": [-INF, 1]}}, RANDOM, "expected two finite numbers"),
        ({"optim.warmup": {"uniform": [0.5, 9]}}, RANDOM, "warmup=0.5: expected a whole number"),
        ({"checkpoint.path": {"uniform": [1, 9]}}, RANDOM, "draws numbers, and the key takes none"),
        ({"model.dim": GRID}, {"arms": {"a": {"model.dim": 8}}}, "sweep.arms.a sets it already"),
        ({}, {"arms": {"a": {"model.dmi": 8}}}, "sweep.arms.a.model.dmi"),
        ({}, {"arms": {"a/b": {}}}, "sweep.arms.a/b: expected a name"),
    ],
)
def test_mistakes_name_their_key(params: dict, keys: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError) as raised:
        expand(params, **keys)
    assert expected in str(raised.value)


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({}, "nothing varies"),
        ({"seeds": []}, "sweep.seeds=[]"),
        ({"seeds": [1, 1]}, "sweep.seeds=[1, 1]"),
        ({"budget": "steps", "amount": 1.5}, "sweep.amount=1.5"),
        ({"amount": float("inf")}, "sweep.amount=inf"),
    ],
)
def test_settings_that_cannot_be(keys: dict[str, Any], expected: str) -> None:
    params = {} if not keys else {"model.dim": GRID}
    with pytest.raises(ConfigError) as raised:
        check_sweep(SweepSettings(params=params, **keys))
    assert expected in str(raised.value)


def test_what_a_reviewer_would_object_to_is_warned_of() -> None:
    assert sweep_warnings(SweepSettings()) == []
    assert "no p-values" in sweep_warnings(SweepSettings(seeds=[0, 1]))[0]
    assert "stopped early" in sweep_warnings(SweepSettings(scheduler="asha"))[0]
