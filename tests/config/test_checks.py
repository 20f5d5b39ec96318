"""What defaults resolve to, which combinations are refused, and what a run may change."""

from __future__ import annotations

import re

import pytest

from modular_lm.config import TrainConfig, load_config
from modular_lm.config.checks import (
    changes,
    global_batch_size,
    largest_world,
    resolve,
    warnings_of,
    world_sizes,
)
from modular_lm.config.columns import _TAKEN
from modular_lm.errors import ConfigError

BASE = ["steps=100", "optim.warmup=10", "data.seq_len=512", "model.module_seq_len=128"]


def resolved(*args: str, vocab: int = 258) -> TrainConfig:
    return resolve(load_config(TrainConfig, [*BASE, *args])[0], vocab)


def test_all_defaults_become_values() -> None:
    c = resolved("model.dim=96", "model.n_heads=6", "model.n_layers=9", "model.module_agg=mean")
    m = c.model
    assert (m.head_dim, m.n_kv_heads, m.module_n_layers, m.module_agg_dim) == (16, 6, 2, 24)
    assert (m.module_agg, m.vocab_size, c.data.seed, c.dump_dir) == ("avg", 258, 42, "runs/debug")
    assert m.module_sum_scale == 1 / 4


def test_sum_scale_counts_chunks_and_summaries_of_training() -> None:
    c = resolved("data.seq_len=500", "model.module_n_summary=4")
    assert c.model.module_sum_scale == 1 / 16
    assert resolved("model.module_seq_len=null").model.module_sum_scale == 1.0


def test_the_order_in_which_sources_are_listed_does_not_matter() -> None:
    one = resolved("data.sources={b: 1, a: 1}").data.sources
    other = resolved("data.sources={a: 1, b: 1}").data.sources
    assert [*one.items()] == [*other.items()]


def test_weights_of_sources_are_normalised() -> None:
    assert resolved("data.sources={a: 80, b: 20}").data.sources == {"a": 0.8, "b": 0.2}


def test_stages_are_by_step_and_normalised() -> None:
    stages = resolved("data.stages={100: {b: 3, a: 1}, 9: {c: 2}}", "data.stages.9.a=2").data.stages
    assert [*stages.items()] == [("9", {"a": 0.5, "c": 0.5}), ("100", {"a": 0.25, "b": 0.75})]


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        (["model.dim=100", "model.n_heads=8"], "model.dim=100"),
        (["model.n_heads=8", "model.n_kv_heads=3"], "model.n_kv_heads=3"),
        (["model.dim=24", "model.n_heads=8"], "model.head_dim=3"),
        (["model.dim=64", "model.head_dim=128"], "model.head_dim=128"),
        (["model.dim=100", "model.head_dim=64"], "model.head_dim=64"),
        (["model.ffn_dim_multiplier=0.0001"], "model.ffn_dim_multiplier=0.0001"),
        (["model.module_n_summary=3"], "model.module_n_summary=3"),
        (["model.module_agg=stack", "model.module_agg_dim=20"], "model.module_agg_dim=20"),
        (["model.vocab_size=100"], "model.vocab_size=100"),
        (["model.create_module_name=code"], "model.create_module_name=code"),
        (["model.module_names=train"], "model.module_names=train"),
        (["model.module_train=new"], "model.module_train=new"),
        (["model.create_module_init=fresh"], "model.create_module_init=fresh"),
        (["model.module_lookback=129"], "model.module_lookback=129"),
        (["model.sliding_window=64"], "model.sliding_window=64"),
        (["distributed.attn_impl=flex", "ray.use_gpu=false"], "distributed.attn_impl=flex"),
        (["distributed.attn_impl=xformers", "model.module_agg=stack"], "distributed.attn_impl="),
        (["optim.lr_multipliers={'aggs.*': -1}"], "optim.lr_multipliers.aggs.*=-1"),
        (["optim.lr_multipliers={'aggs.*': .inf}"], "optim.lr_multipliers.aggs.*=inf"),
        (["optim.scheduler=wsd", "optim.cycle_length=0.5"], "optim.cycle_length=0.5"),
        (["data.sources={}"], "data.sources="),
        (["data.sources={a: 0}"], "data.sources.a=0"),
        (["data.stages={8: {}}"], "data.stages.8="),
        (["data.stages={8: {a: -1}}"], "data.stages.8.a=-1"),
        (["data.stages={0: {a: 1}}"], "data.stages.0: expected a step > 0"),
        (["data.stages={late: {a: 1}}"], "data.stages.late: expected a step > 0"),
        (["stop_at=101"], "stop_at=101"),
        (["ray.num_workers=[4,2]"], "ray.num_workers=[4,2]"),
        (["ray.num_workers=[1,2,3]"], "ray.num_workers=[1,2,3]"),
        (["name="], "name="),
        (["name=../x"], "name=../x"),
    ],
)
def test_contradictions_name_the_key(arguments: list[str], key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolved(*arguments)
    assert str(caught.value).startswith(key)


@pytest.mark.parametrize(
    ("arguments", "warns"),
    [
        (["model.module_seq_len=512"], True),
        (["model.module_seq_len=null"], True),
        (["model.module_n_layers=8"], True),
        (["model.module_agg=drop", "model.module_seq_len=null", "model.module_lookback=8"], True),
        (["model.module_agg=drop", "model.module_seq_len=128", "model.module_lookback=8"], False),
        (["optim.warmup=101"], True),
        (["optim.scheduler=wsd", "optim.warmup=91"], True),
        (["optim.scheduler=wsd", "optim.warmup=90"], False),
        (["optim.lr_multipliers={'aggs.*': 0}"], True),
        (["optim.lr_multipliers={'aggs.*': 0.1}"], False),
        (["data.stages={100: {builtin: 1}}"], True),
        (["data.stages={99: {builtin: 1}}"], False),
        (["model.module_seq_len=512", "model.module_agg=drop"], False),
        ([], False),
    ],
)
def test_warnings_of_what_cannot_act(arguments: list[str], warns: bool) -> None:
    assert bool(warnings_of(resolved(*arguments))) is warns


def test_global_batch_size() -> None:
    assert global_batch_size(resolved("data.batch_size=4", "grad_acc_steps=3"), 2) == 24


def test_a_run_may_change_its_learning_rate_but_not_its_model_or_optimizer() -> None:
    old = resolved()
    refused, allowed = changes(old, resolved("optim.lr=1e-4", "stop_at=50"))
    assert (refused, allowed) == ([], ["optim.lr: 0.0003 -> 0.0001"])
    refused, _ = changes(old, resolved("optim.name=muon"))
    assert refused == ["optim.name: adamw -> muon"]
    refused, _ = changes(old, resolved("model.dim=64"))
    assert [line.split(":")[0] for line in refused] == [
        "model.dim",
        "model.head_dim",
        "model.module_agg_dim",
    ]


def test_words_that_no_column_can_have_are_those_of_torch() -> None:
    """A column is a key of a ModuleDict, which refuses the names of its own attributes."""
    from torch import nn

    names = (n for n in dir(nn.ModuleDict()) if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", n))
    assert set(_TAKEN) == {"auto", "base", *names}


def test_num_workers_is_a_number_or_a_range() -> None:
    assert world_sizes(resolved("ray.num_workers=3").ray) == (3, 3)
    assert world_sizes(resolved("ray.num_workers=[1,4]").ray) == (1, 4)
    assert world_sizes(resolved("ray.num_workers=2,2").ray) == (2, 2)
    for wrong in ("[0,4]", "[1,x]", "0", "many"):
        with pytest.raises(ConfigError, match=r"ray\.num_workers"):
            resolved(f"ray.num_workers={wrong}")


def test_a_range_of_workers_is_taken_in_sizes_that_form_the_mesh() -> None:
    plain = resolved("ray.num_workers=[2,6]")
    assert [largest_world(plain, n) for n in (1, 2, 5, 9)] == [0, 2, 5, 6]
    pairs = resolved("ray.num_workers=[2,6]", "distributed.tp_size=2")
    assert [largest_world(pairs, n) for n in (1, 2, 5, 9)] == [0, 2, 4, 6]
    with pytest.raises(ConfigError, match="cannot be made of 1 worker"):
        resolved("ray.num_workers=[1,4]", "distributed.tp_size=2")
