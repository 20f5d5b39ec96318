"""Which sample comes when: global sample index -> (source, epoch, position), as pure functions.

The order of training data depends on (sources and their weights, seed, global sample index) and on
nothing else: not on the world size, the micro-batch, restarts or prefetching. So the whole state of
a data loader is one integer, and any process can compute any part of the order by itself.

- Which source: a periodic schedule of slots that follows the weights as closely as possible
  (`schedule`), the same in every period.
- Which sample of that source: the how-many-th draw c from the source this is gives the epoch
  c // n and, through a pseudo-random permutation of 0..n-1 keyed by (seed, source, epoch)
  (`permute`), the position. No position comes twice before all came once.

Reading the tokens at a position is `reader`'s business.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from modular_lm.errors import ConfigError

Int64s = npt.NDArray[np.int64]

# Weights in thousandths are met exactly within 1,000 samples; others are rounded to 1/10,000.
_EXACT_SLOTS = 1_000
_MAX_SLOTS = 10_000
_ROUNDS = 6


@dataclass(frozen=True)
class Source:
    """A source as the plan sees it: `n_samples` of them make one epoch."""

    name: str
    weight: float
    n_samples: int


@dataclass(frozen=True)
class Location:
    """Where n samples lie; all arrays [n]: index into the plan's sources, epoch, position."""

    source: Int64s
    epoch: Int64s
    position: Int64s


class DataPlan:
    """The order of the samples of weighted sources.

    Raises ConfigError for a source too small to fill a sample, or with a weight too small to ever
    be drawn.
    """

    def __init__(self, sources: Sequence[Source], seed: int) -> None:
        for source in sources:
            if source.n_samples < 1:
                raise ConfigError(
                    f"data.sources.{source.name}: holds less than one sample of data.seq_len + 1 "
                    "tokens; use a shorter data.seq_len or more text"
                )
        self.sources = tuple(sources)
        self.seed = seed
        slots = slots_of_weights(tuple((s.name, s.weight) for s in sources))
        self._slot_source, self._slot_draws = schedule(slots)
        self._draws_per_period = np.array(slots, np.int64)

    def locate(self, index: npt.ArrayLike) -> Location:
        """Where the samples of the global indices `index` [n] lie."""
        index = np.asarray(index, np.int64)
        period, slot = np.divmod(index, len(self._slot_source))
        source = self._slot_source[slot]
        draw = period * self._draws_per_period[source] + self._slot_draws[slot]
        n_samples = np.array([s.n_samples for s in self.sources], np.int64)[source]
        epoch, nth = np.divmod(draw, n_samples)
        position = np.empty_like(nth)
        for number, epoch_number in {*zip(source.tolist(), epoch.tolist(), strict=True)}:
            mine = (source == number) & (epoch == epoch_number)
            this = self.sources[number]
            key = _key(self.seed, this.name, epoch_number)
            position[mine] = permute(nth[mine], this.n_samples, key)
        return Location(source, epoch, position)


def slots_of_weights(weights: tuple[tuple[str, float], ...]) -> tuple[int, ...]:
    """Weights as whole numbers of slots in the shortest period that holds them.

    Weights in thousandths are kept exactly, others rounded by largest remainder to 1/10,000.
    """
    total = math.fsum(w for _, w in weights)
    shares = [w / total for _, w in weights]
    slots = [round(share * _EXACT_SLOTS) for share in shares]
    if any(abs(n - s * _EXACT_SLOTS) > 1e-6 for n, s in zip(slots, shares, strict=True)):
        slots = [math.floor(share * _MAX_SLOTS) for share in shares]
        remainders = [share * _MAX_SLOTS - n for share, n in zip(shares, slots, strict=True)]
        largest = sorted(range(len(slots)), key=lambda i: (-remainders[i], i))
        for i in largest[: _MAX_SLOTS - sum(slots)]:
            slots[i] += 1
    for (name, weight), n in zip(weights, slots, strict=True):
        if n == 0:
            raise ConfigError(
                f"data.sources.{name}={weight:g}: less than 1/{_MAX_SLOTS} of all weights, it "
                "would never be drawn; raise it or remove the source"
            )
    divisor = math.gcd(*slots)
    return tuple(n // divisor for n in slots)


@functools.lru_cache(maxsize=8)
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


def permute(index: Int64s, n: int, key: int) -> Int64s:
    """A pseudo-random permutation of 0..n-1, evaluated at `index` [k]; bijective for every key.

    A Feistel network over the smallest even number of bits that holds n, walked along its cycle
    until the value falls below n (J. Black and P. Rogaway, "Ciphers with arbitrary finite
    domains", CT-RSA 2002). Mixing, not secrecy, is wanted: the round function is splitmix64's.
    """
    half = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
    low = (np.uint64(1) << half) - np.uint64(1)
    keys = _mix(np.arange(_ROUNDS, dtype=np.uint64) + np.uint64(key))
    value = index.astype(np.uint64)
    outside = np.ones(len(value), bool)
    while outside.any():
        walking = value[outside]
        left, right = walking >> half, walking & low
        for round_key in keys:
            left, right = right, left ^ (_mix(right ^ round_key) & low)
        value[outside] = (left << half) | right
        outside &= value >= np.uint64(n)
    return value.astype(np.int64)


def _mix(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The finaliser of splitmix64 (S. Vigna, public domain): a bijection of 64-bit numbers."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _key(seed: int, source: str, epoch: int) -> int:
    digest = hashlib.blake2b(f"{seed}\0{source}\0{epoch}".encode(), digest_size=8).digest()
    # Half the range, so that adding the round number cannot overflow.
    return int.from_bytes(digest, "little") >> 1
