"""Schedules against their formulas, written out here by themselves."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modular_lm.config import OptimConfig
from modular_lm.config.optim import DecayShape, Scheduler
from modular_lm.optim import learning_rate
from modular_lm.optim.schedules import DECAYS, SCHEDULES

N, W, M = 400, 40, 0.2  # steps, warm-up, lr_min_ratio


def curve(**keys: Any) -> list[float]:
    """The factor at every step, and at the end of the last."""
    c = OptimConfig(**{"lr": 1.0, "warmup": W, "lr_min_ratio": M, **keys})
    return [learning_rate(c, N, step) for step in range(N + 1)]


def share(step: int) -> float:
    return (step - W) / (N - W)


def down(x: float) -> float:
    return M + (1 - M) * x


def test_warm_up_is_linear_and_reaches_the_peak() -> None:
    for scheduler in SCHEDULES:
        assert curve(scheduler=scheduler)[:W] == pytest.approx([(s + 1) / W for s in range(W)])


def test_constant() -> None:
    assert curve(scheduler="constant")[W:] == [1.0] * (N - W + 1)


def test_linear() -> None:
    expected = [1 - (1 - M) * share(s) for s in range(W, N + 1)]
    assert curve(scheduler="linear")[W:] == pytest.approx(expected)


def test_cosine() -> None:
    expected = [down((1 + math.cos(math.pi * share(s))) / 2) for s in range(W, N + 1)]
    assert curve()[W:] == pytest.approx(expected)


@pytest.mark.parametrize("cycles", [2, 4, 1.6])
def test_cosine_restarts_in_every_cycle(cycles: float) -> None:
    rates = curve(cycle_length=1 / cycles)
    length = (N - W) / cycles
    for step in range(W, N):
        y = (step - W) / length - (step - W) // length
        assert rates[step] == pytest.approx(down((1 + math.cos(math.pi * y)) / 2))
    begins = [W + math.ceil(k * length) for k in range(1, math.ceil(cycles))]
    jumps = [s for s in range(W + 1, N) if rates[s] > rates[s - 1]]
    assert jumps == begins


def test_inverse_square_root() -> None:
    expected = [max(M, math.sqrt(W / (s + 1))) for s in range(W, N + 1)]
    assert curve(scheduler="inv_sqrt")[W:] == pytest.approx(expected)
    expected = [max(M, W / (s + 1)) for s in range(W, N + 1)]
    assert curve(scheduler="inv_sqrt", exp_factor=1.0)[W:] == pytest.approx(expected)
    assert curve(scheduler="inv_sqrt", warmup=0)[3] == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("shape", "formula"),
    [
        ("linear", lambda z: 1 - z),
        ("cosine", lambda z: (1 + math.cos(math.pi * z)) / 2),
        ("1-sqrt", lambda z: 1 - z**0.5),
    ],
)
def test_warmup_stable_decay(shape: DecayShape, formula: Any) -> None:
    assert shape in DECAYS
    rates = curve(scheduler="wsd", decay_fraction=0.25, decay_shape=shape)
    assert rates[W:301] == [1.0] * (301 - W)
    assert rates[301:] == pytest.approx([down(formula((s - 300) / 100)) for s in range(301, N + 1)])
    assert rates[N] == pytest.approx(M)


@given(
    scheduler=st.sampled_from(list(SCHEDULES)),
    shape=st.sampled_from(list(DECAYS)),
    steps=st.integers(1, 300),
    warmup=st.integers(0, 400),
    minimum=st.floats(0, 1),
    cycle=st.floats(0.05, 1),
    fraction=st.floats(0.001, 1),
)
def test_every_schedule_stays_within_its_bounds(
    scheduler: Scheduler,
    shape: DecayShape,
    steps: int,
    warmup: int,
    minimum: float,
    cycle: float,
    fraction: float,
) -> None:
    c = OptimConfig(
        lr=2.0,
        warmup=warmup,
        scheduler=scheduler,
        lr_min_ratio=minimum,
        cycle_length=cycle,
        decay_fraction=fraction,
        decay_shape=shape,
    )
    rates = [learning_rate(c, steps, step) for step in range(steps)]
    assert all(0 < rate <= 2.0 or (minimum == 0 and rate >= 0) for rate in rates)
    assert all(rate >= 2.0 * minimum - 1e-9 for rate in rates[warmup:])
