"""Which source a sample comes from: weighted sources, in stages, as pure functions of the index.

Within a stage the sources follow a periodic schedule of slots that keeps as close to the weights
as any schedule can (`schedule`). At the border of two stages the schedule begins anew, but the
sources go on where they were: the how-many-th draw of a source a sample is counts all stages, so
that no sample of an epoch is skipped or comes twice. What is drawn is `permutation`'s business.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from modular_lm.errors import ConfigError

Int64s = npt.NDArray[np.int64]

# The longest period of a schedule. Weights with a common denominator up to it are met exactly,
# others are rounded to fractions of it.
MAX_SLOTS = 10_000
_EXACT = 1e-9


@dataclass(frozen=True)
class Stage:
    """From the global sample index `first` on, sources are drawn with these weights.

    key: what users call it, for messages (`data.sources`, `data.stages.8000`); a source that is
    not in `weights` is not drawn.
    """

    first: int
    weights: dict[str, float]
    key: str


class Mixture:
    """The source of every sample: `names` under one stage or several, the first beginning at 0.

    Raises ConfigError for a weight too small to ever be drawn.
    """

    def __init__(self, names: Sequence[str], stages: Sequence[Stage]) -> None:
        assert stages[0].first == 0, "the first stage begins with the first sample"
        self._arguments = (names, stages)
        self._first = np.array([stage.first for stage in stages], np.int64)
        self._schedules = [_Schedule.of(names, stage) for stage in stages]
        drawn = np.zeros(len(names), np.int64)
        self._drawn_before = [drawn]
        for schedule_, length in zip(self._schedules, np.diff(self._first), strict=False):
            drawn = drawn + schedule_.draws_in(int(length))
            self._drawn_before.append(drawn)

    def __reduce__(self) -> tuple[Any, ...]:
        # Made anew from a few numbers, for which a process remembers the schedules.
        return Mixture, self._arguments

    def draw(self, index: Int64s) -> tuple[Int64s, Int64s]:
        """Of the samples `index` [n]: the source of each, and how many draws it had before. [n]."""
        stage = np.searchsorted(self._first, index, side="right") - 1
        source, nth = np.empty_like(index), np.empty_like(index)
        for number in np.unique(stage):
            mine = stage == number
            schedule_ = self._schedules[number]
            source[mine], within = schedule_.draw(index[mine] - self._first[number])
            nth[mine] = within + self._drawn_before[number][source[mine]]
        return source, nth


@dataclass(frozen=True)
class _Schedule:
    """One period: the source of each slot, its draws before within the period; draws of a period
    by source."""

    source: Int64s
    before: Int64s
    draws: Int64s

    @classmethod
    def of(cls, names: Sequence[str], stage: Stage) -> _Schedule:
        drawn = [number for number, name in enumerate(names) if name in stage.weights]
        slots = slots_of_weights({names[i]: stage.weights[names[i]] for i in drawn}, stage.key)
        source, before = schedule(slots)
        draws = np.zeros(len(names), np.int64)
        draws[drawn] = slots
        return cls(np.array(drawn, np.int64)[source], before, draws)

    def draw(self, index: Int64s) -> tuple[Int64s, Int64s]:
        period, slot = np.divmod(index, len(self.source))
        source = self.source[slot]
        return source, period * self.draws[source] + self.before[slot]

    def draws_in(self, length: int) -> Int64s:
        """How often each source is drawn in the first `length` samples."""
        periods, rest = divmod(length, len(self.source))
        return periods * self.draws + np.bincount(self.source[:rest], minlength=len(self.draws))


def slots_of_weights(weights: dict[str, float], key: str = "data.sources") -> tuple[int, ...]:
    """Weights as whole numbers of slots, in the shortest period that holds them.

    Exact for weights with a common denominator up to 10,000 (thousandths, thirds, 7 to 3, ...),
    else rounded to 1/10,000 by largest remainder. key: whose weights they are, for the ConfigError
    about a weight that rounds to no slot.
    """
    total = math.fsum(weights.values())
    shares = np.array([w / total for w in weights.values()])
    periods = np.arange(1, MAX_SLOTS + 1)[:, None]
    slots = np.rint(shares * periods)
    exact = np.flatnonzero((np.abs(slots - shares * periods) <= _EXACT * periods).all(axis=1))
    if len(exact) and slots[exact[0]].all():
        return tuple(int(n) for n in slots[exact[0]])
    floor = np.floor(shares * MAX_SLOTS).astype(int)
    largest = np.argsort(floor - shares * MAX_SLOTS, kind="stable")
    floor[largest[: MAX_SLOTS - floor.sum()]] += 1
    for (name, weight), n in zip(weights.items(), floor, strict=True):
        if n == 0:
            raise ConfigError(
                f"{key}.{name}={weight:g}: less than 1/{MAX_SLOTS} of all weights, it would never "
                "be drawn; raise it or remove the source"
            )
    return tuple(int(n) for n in floor // np.gcd.reduce(floor))


@functools.lru_cache(maxsize=32)
def schedule(slots: tuple[int, ...]) -> tuple[Int64s, Int64s]:
    """One period of draws in which source i has slots[i] of sum(slots) slots, spread evenly.

    Returns (source of each slot, how many draws that source had before within the period).
    In every prefix each of the k >= 2 sources is within 1 - 1/(2k - 2) draws of its share, which
    is the best bound possible: R. Tijdeman, "The chairman assignment problem", Discrete
    Mathematics 32 (1980). Over any window the deviation is therefore below 2 draws.
    """
    k, period = len(slots), sum(slots)
    if k == 1:
        return np.zeros(1, np.int64), np.zeros(1, np.int64)
    share = np.array(slots, np.int64)
    scale = 2 * k - 2
    drawn = np.zeros(k, np.int64)
    source = np.empty(period, np.int64)
    before = np.empty(period, np.int64)
    for n in range(period):
        # How far each source lags behind its share once this slot is filled, times `period`; all
        # in whole numbers, so that every machine makes the same schedule.
        lag = share * (n + 1) - period * drawn
        eligible = lag * scale >= period
        slack = (period * (scale - 1) - lag * scale) / share
        chosen = int(np.argmin(np.where(eligible, slack, np.inf)))
        source[n], before[n] = chosen, drawn[chosen]
        drawn[chosen] += 1
    return source, before
