"""Which parameters decay, at which rate they learn, and what a step that is skipped leaves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from modular_lm.config import OptimConfig
from modular_lm.errors import ConfigError
from modular_lm.model.lm import LanguageModel
from modular_lm.optim import Optimizers, build_optimizers
from modular_lm.optim.muon import Muon
from tests.model.tiny_models import tiny_model


def model() -> LanguageModel:
    return tiny_model(torch.float32, module_agg="stack", module_names=["code"])


def config(**keys: Any) -> OptimConfig:
    return OptimConfig(**{"weight_decay": 0.0, **keys})


def moved(model: nn.Module, optimizers: Optimizers, gradient: float = 1.0) -> dict[str, float]:
    """How far each parameter went in a step of lr 1 along a constant gradient: the largest way."""
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.full_like(p, gradient)
    optimizers.set_learning_rate(1.0)
    optimizers.step()
    ways = {n: (p - before[n]).abs().max().item() for n, p in model.named_parameters()}
    return {n: round(way, 3) for n, way in ways.items()}


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_norms_and_embedding_do_not_decay(name: Any) -> None:
    m = model()
    ways = moved(m, build_optimizers(m, config(name=name, weight_decay=0.5)), gradient=0.0)
    still = {n for n, way in ways.items() if way == 0}
    zeros = {n for n, p in m.named_parameters() if not p.any()}  # of these nothing can decay
    norms = {n for n, p in m.named_parameters() if p.ndim == 1}
    assert still == zeros | norms | {"tok_embeddings.weight"}


def test_muon_takes_the_matrices_of_the_body_and_adamw_the_rest() -> None:
    m = model()
    muon, adamw = build_optimizers(m, config(name="muon")).parts
    assert isinstance(muon, Muon)
    names = {p: n for n, p in m.named_parameters()}
    mine, others = (
        {names[p] for group in part.param_groups for p in group["params"]} for part in (muon, adamw)
    )
    assert mine | others == set(names.values())
    vectors = {n for n, p in m.named_parameters() if p.ndim == 1}
    assert others == vectors | {"tok_embeddings.weight", "output.weight"}
    assert any(n.startswith("aggs.") for n in mine)
    assert any(n.startswith("columns.code.") for n in mine)


def test_multipliers_hold_by_name_for_modules_columns_and_sites_the_last_one_counts() -> None:
    m = model()
    patterns = {"columns.code.*": 0.25, "aggs.*": 0.5, "*.wq.weight": 2.0, "output.weight": 0.0}
    ways = moved(m, build_optimizers(m, config(lr_multipliers=patterns)))
    for name, way in ways.items():
        expected = 1.0  # AdamW's first step is lr long
        if name == "output.weight":
            expected = 0.0
        elif name.endswith(".wq.weight"):
            expected = 2.0
        elif name.startswith("aggs."):
            expected = 0.5
        elif name.startswith("columns.code."):
            expected = 0.25
        assert way == pytest.approx(expected, abs=1e-3), name


def test_a_pattern_that_matches_nothing_is_refused() -> None:
    c = config(lr_multipliers={"layers.*": 2.0, "agg.*": 0.5})
    with pytest.raises(ConfigError, match=r"optim\.lr_multipliers\.agg\.\*=0\.5: matches no"):
        build_optimizers(model(), c)


def test_frozen_parameters_are_left_out_and_an_optimizer_without_any_too() -> None:
    m = model()
    for name, parameter in m.named_parameters():
        parameter.requires_grad_(name.endswith("norm.weight"))
    optimizers = build_optimizers(m, config(name="muon"))
    (adamw,) = optimizers.parts
    learning = [p for group in adamw.param_groups for p in group["params"]]
    assert len(learning) == sum(p.requires_grad for p in m.parameters())


def everything(m: nn.Module, optimizers: Optimizers) -> list[Tensor]:
    states = [state for part in optimizers.parts for state in part.state.values()]
    state = [tensor for of_parameter in states for tensor in of_parameter.values()]
    return [t.detach().clone() for t in (*m.parameters(), *state)]


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_skipped_step_changes_nothing_whatever_the_gradient(name: Any) -> None:
    m = model()
    optimizers = build_optimizers(m, config(name=name, weight_decay=0.1))
    moved(m, optimizers)
    before = everything(m, optimizers)
    for bad in (float("nan"), float("inf"), 1.0):
        for p in m.parameters():
            p.grad = torch.full_like(p, bad)
        optimizers.step(found_inf=torch.tensor(1.0))
        after = everything(m, optimizers)
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    optimizers.step(found_inf=torch.tensor(0.0))
    after = everything(m, optimizers)
    assert not any(torch.equal(a, b) for a, b in zip(before, after, strict=True))
