"""Schedules against their formulas, and which parameters decay."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from modular_lm.config import OptimConfig
from modular_lm.optim import build_optimizer, learning_rate


def test_warm_up_is_linear_and_reaches_the_peak() -> None:
    c = OptimConfig(lr=1.0, warmup=10)
    assert [learning_rate(c, 100, s) for s in (0, 4, 9)] == pytest.approx([0.1, 0.5, 1.0])


@pytest.mark.parametrize(
    ("scheduler", "half", "end"),
    [("constant", 1.0, 1.0), ("linear", 0.6, 0.2), ("cosine", 0.6, 0.2)],
)
def test_schedule_at_its_middle_and_end(scheduler: str, half: float, end: float) -> None:
    c = OptimConfig(lr=1.0, warmup=20, lr_min_ratio=0.2, scheduler=scheduler)  # type: ignore[arg-type]
    assert learning_rate(c, 120, 70) == pytest.approx(half)
    assert learning_rate(c, 120, 120) == pytest.approx(end)


def test_cosine_formula_at_a_quarter() -> None:
    c = OptimConfig(lr=3e-4, warmup=0, lr_min_ratio=0.0)
    assert learning_rate(c, 400, 100) == pytest.approx(3e-4 * (1 + math.cos(math.pi / 4)) / 2)


def test_norms_and_embedding_do_not_decay() -> None:
    model = nn.Module()
    model.tok_embeddings = nn.Embedding(5, 4)
    model.proj = nn.Linear(4, 4, bias=False)
    model.norm = nn.RMSNorm(4)
    optimizer = build_optimizer(model, OptimConfig(lr=1.0, weight_decay=0.5))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {"proj.weight"}
