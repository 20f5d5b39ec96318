"""What a few seeds allow one to say: intervals, paired tests, their correction, a bootstrap.

The unit of repetition is the seed. Arms share seeds, and with them data order and initial trunk, so
differences are taken within seeds. Nothing here knows of runs or losses. SciPy, which MLflow brings
along, is imported where it is used: it takes a second.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

CONFIDENCE = 0.95
FEWEST_FOR_P = 3
"""Seeds that a p-value takes: with two, one degree of freedom is left, and nothing is clear."""

# Differences that differ less than this are the same but for rounding.
_ROUNDING = 1e-12


@dataclass(frozen=True)
class Interval:
    """A mean of n values with its confidence interval, which one value alone does not have."""

    mean: float
    low: float | None
    high: float | None
    n: int


@dataclass(frozen=True)
class Paired:
    """Mean difference to a baseline over n shared seeds; p: two-sided, of the paired t-test."""

    difference: Interval
    p: float | None


def mean_interval(values: Sequence[float]) -> Interval:
    """The mean and its 95 % confidence interval by Student's t. values: at least one."""
    n, mean = len(values), float(np.mean(values))
    if n < 2:
        return Interval(mean, None, None, n)
    from scipy import stats

    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, n - 1) * np.std(values, ddof=1) / math.sqrt(n))
    return Interval(mean, mean - half, mean + half, n)


def paired(values: Mapping[int, float], baseline: Mapping[int, float]) -> Paired | None:
    """Compare by seed. values, baseline: seed -> value. None without a shared seed."""
    seeds = sorted(values.keys() & baseline.keys())
    if not seeds:
        return None
    mine, theirs = [values[s] for s in seeds], [baseline[s] for s in seeds]
    differences = [a - b for a, b in zip(mine, theirs, strict=True)]
    return Paired(mean_interval(differences), _paired_p(mine, theirs))


def _paired_p(mine: Sequence[float], theirs: Sequence[float]) -> float | None:
    if len(mine) < FEWEST_FOR_P:
        return None
    differences = np.subtract(mine, theirs)
    if np.ptp(differences) <= _ROUNDING * np.abs([*mine, *theirs]).max():
        # No spread to compare with: the same result, or one that no test can judge.
        return 1.0 if not differences.any() else None
    from scipy import stats

    return float(stats.ttest_rel(mine, theirs).pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment: each may be compared with the level of the whole family."""
    n = len(p_values)
    adjusted, least = [0.0] * n, 0.0
    for rank, i in enumerate(np.argsort(p_values, kind="stable")):
        least = max(least, min(1.0, (n - rank) * p_values[i]))
        adjusted[i] = least
    return adjusted


def bootstrap_difference(
    mine: npt.ArrayLike, theirs: npt.ArrayLike, tokens: npt.ArrayLike, resamples: int = 2000
) -> Interval:
    """The difference per token of two models on the same documents, and its 95 % interval.

    mine, theirs: summed nll of each document [D]; tokens: scored tokens of each [D]. Documents are
    drawn with replacement, the same for both models; percentiles of their token-weighted means.
    Says how much depends on which documents were held out, nothing of other seeds.
    """
    difference = np.subtract(mine, theirs, dtype=np.float64)
    weight = np.asarray(tokens, dtype=np.float64)
    n, mean = len(weight), float(difference.sum() / weight.sum())
    if n < 2:
        return Interval(mean, None, None, n)
    from scipy import stats

    def per_token(d: npt.NDArray, w: npt.NDArray, axis: int) -> npt.NDArray:
        return d.sum(axis=axis) / w.sum(axis=axis)

    found = stats.bootstrap(
        (difference, weight),
        per_token,
        paired=True,
        vectorized=True,
        n_resamples=resamples,
        batch=100,  # of D documents at a time in memory
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return Interval(mean, float(found.low), float(found.high), n)
