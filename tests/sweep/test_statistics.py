"""The statistics against scipy, textbook samples and their own definitions."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from modular_lm.sweep.statistics import (
    Interval,
    bootstrap_difference,
    holm,
    mean_interval,
    paired,
)

# Student's own sample (1908): hours of sleep gained with two drugs, by the same ten patients.
DRUG_1 = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]
DRUG_2 = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]

finite = st.floats(-1e3, 1e3)


def by_seed(values: list[float]) -> dict[int, float]:
    return dict(enumerate(values))


def test_student_s_sample_of_1908() -> None:
    found = paired(by_seed(DRUG_1), by_seed(DRUG_2))
    assert found is not None
    assert found.difference.mean == pytest.approx(-1.58)
    assert (found.difference.low, found.difference.high) == pytest.approx(
        (-2.4599, -0.7001), abs=1e-4
    )
    assert found.p == pytest.approx(0.002833, abs=1e-6)
    assert found.difference.n == 10


@settings(deadline=None)
@given(st.lists(finite, min_size=2, max_size=8))
def test_the_interval_is_scipy_s(values: list[float]) -> None:
    found = mean_interval(values)
    assert found.n == len(values)
    assert found.mean == pytest.approx(np.mean(values))
    if np.ptp(values) > 1e-6:  # below, scipy itself warns of its precision
        low, high = stats.ttest_1samp(values, 0.0).confidence_interval(0.95)
        assert (found.low, found.high) == pytest.approx((low, high), rel=1e-6, abs=1e-9)


@settings(deadline=None)
@given(st.lists(st.tuples(finite, finite), min_size=3, max_size=8))
def test_the_p_value_is_scipy_s_over_shared_seeds(pairs: list[tuple[float, float]]) -> None:
    mine, theirs = by_seed([a for a, _ in pairs]), by_seed([b for _, b in pairs])
    found = paired({**mine, 77: 1.0}, {**theirs, 99: 1e6})  # seeds of one arm only do not count
    assert found is not None
    differences = [a - b for a, b in pairs]
    if np.ptp(differences) > 1e-6:
        expected = stats.ttest_rel([a for a, _ in pairs], [b for _, b in pairs]).pvalue
        assert found.p == pytest.approx(expected)
    assert found.difference == mean_interval(differences)


def test_few_seeds_claim_little() -> None:
    assert mean_interval([1.5]) == Interval(1.5, None, None, 1)
    assert paired({1: 1.0}, {2: 1.0}) is None
    two = paired({1: 1.0, 2: 1.1}, {1: 2.0, 2: 2.3})
    assert two is not None
    assert two.p is None
    assert two.difference.low is not None
    assert two.difference.low < two.difference.mean


def test_differences_without_spread() -> None:
    same = paired({1: 1.0, 2: 2.0, 3: 3.0}, {1: 1.0, 2: 2.0, 3: 3.0})
    shifted = paired({1: 1.5, 2: 2.5, 3: 3.5}, {1: 1.0, 2: 2.0, 3: 3.0})
    assert same is not None
    assert same.p == 1.0
    assert shifted is not None
    assert shifted.p is None


def test_holm_as_r_adjusts() -> None:
    # p.adjust(c(0.01, 0.02, 0.03, 0.04), "holm") and an unordered vector with a tie, from R.
    assert holm([0.01, 0.02, 0.03, 0.04]) == pytest.approx([0.04, 0.06, 0.06, 0.06])
    assert holm([0.03, 0.005, 0.6, 0.03]) == pytest.approx([0.09, 0.02, 0.6, 0.09])
    assert holm([]) == []
    assert holm([0.2]) == [0.2]


@settings(deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=12), st.floats(0.001, 0.5))
def test_holm_rejects_what_its_definition_rejects(p_values: list[float], level: float) -> None:
    adjusted = holm(p_values)
    n = len(p_values)
    rejected = set()
    for rank, i in enumerate(sorted(range(n), key=lambda i: p_values[i])):
        if (n - rank) * p_values[i] > level:
            break
        rejected.add(i)
    assert {i for i, p in enumerate(adjusted) if p <= level} == rejected
    assert all(p <= q <= 1 for p, q in zip(p_values, adjusted, strict=True))


def test_the_bootstrap_covers_what_repeated_samples_would_show() -> None:
    """Its width against the standard error of a ratio over many samples of the same population."""
    generator = np.random.default_rng(1)

    def sample() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        tokens = generator.integers(50, 500, 200)
        base = generator.normal(3.0, 0.5, 200) * tokens
        return base + generator.normal(0.02, 0.1, 200) * tokens, base, tokens

    def ratio(mine: np.ndarray, base: np.ndarray, tokens: np.ndarray) -> float:
        return float((mine - base).sum() / tokens.sum())

    means = [ratio(*sample()) for _ in range(400)]
    found = bootstrap_difference(*(drawn := sample()))
    assert found.mean == pytest.approx(ratio(*drawn))
    assert found.low is not None
    assert found.high is not None
    assert found.low < found.mean < found.high
    assert (found.high - found.low) / (2 * 1.96) == pytest.approx(np.std(means), rel=0.25)


def test_the_bootstrap_draws_documents_in_pairs() -> None:
    # Both models find document 2 hard, by the same amount: that says nothing of their difference.
    base = np.array([100.0, 900.0, 100.0, 110.0])
    found = bootstrap_difference(base + 10, base, [100, 100, 100, 100])
    assert (found.low, found.mean, found.high) == pytest.approx((0.1, 0.1, 0.1))
    assert bootstrap_difference([110.0], [100.0], [100]) == Interval(0.1, None, None, 1)
