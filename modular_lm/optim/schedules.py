"""Learning-rate schedules as pure functions of the step.

All begin with `warmup` steps of linear warm-up. What follows is a factor on `lr`, with
m = lr_min_ratio, and x the share that is done of the steps after the warm-up:

    constant   1
    linear     1 - (1 - m) x
    cosine     m + (1 - m) (1 + cos(pi y)) / 2, y from 0 to 1 in each cycle of cycle_length
    inv_sqrt   max(m, (warmup / (step + 1)) ** exp_factor)
    wsd        1, and in the last decay_fraction of all steps m + (1 - m) d(z), z from 0 to 1:
               d = 1 - z (linear), (1 + cos(pi z)) / 2 (cosine), 1 - sqrt(z) (1-sqrt)
"""

from __future__ import annotations

import math
from collections.abc import Callable

from modular_lm.config.schema import OptimConfig

Schedule = Callable[[OptimConfig, int, int], float]


def learning_rate(config: OptimConfig, steps: int, step: int) -> float:
    """The learning rate of optimizer step `step` (0-based) of `steps`.

    Linear from lr / warmup at step 0 to lr at step warmup - 1, then the schedule; those that end
    at lr * lr_min_ratio reach it at step `steps`.
    """
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    return config.lr * SCHEDULES[config.scheduler](config, steps, step)


def _constant(config: OptimConfig, steps: int, step: int) -> float:
    return 1.0


def _linear(config: OptimConfig, steps: int, step: int) -> float:
    return _down_to(config.lr_min_ratio, 1.0 - _done(config, steps, step))


def _cosine(config: OptimConfig, steps: int, step: int) -> float:
    cycles = _done(config, steps, step) / config.cycle_length
    # A border between two cycles, but for the end of the last, is the begin of the next one.
    place = cycles % 1.0 if step < steps else min(cycles, 1.0)
    return _down_to(config.lr_min_ratio, _half_cosine(place))


def _inv_sqrt(config: OptimConfig, steps: int, step: int) -> float:
    factor = (max(1, config.warmup) / (step + 1)) ** config.exp_factor
    return max(config.lr_min_ratio, factor)


def _wsd(config: OptimConfig, steps: int, step: int) -> float:
    begin = decay_start(config, steps)
    if step <= begin:
        return 1.0
    place = min(1.0, (step - begin) / (steps - begin))
    return _down_to(config.lr_min_ratio, DECAYS[config.decay_shape](place))


# From the config, the number of steps and a step after the warm-up to a factor on lr.
SCHEDULES: dict[str, Schedule] = {
    "constant": _constant,
    "linear": _linear,
    "cosine": _cosine,
    "inv_sqrt": _inv_sqrt,
    "wsd": _wsd,
}


def decay_start(config: OptimConfig, steps: int) -> int:
    """The last step of wsd at the full learning rate."""
    return steps - round(config.decay_fraction * steps)


def _half_cosine(place: float) -> float:
    return 0.5 * (1.0 + math.cos(math.pi * place))


DECAYS: dict[str, Callable[[float], float]] = {
    "linear": lambda place: 1.0 - place,
    "cosine": _half_cosine,
    "1-sqrt": lambda place: 1.0 - math.sqrt(place),
}


def _done(config: OptimConfig, steps: int, step: int) -> float:
    """The share of the steps after the warm-up that lie before `step`."""
    return min(1.0, (step - config.warmup) / max(1, steps - config.warmup))


def _down_to(minimum: float, share: float) -> float:
    """From 1 at share 1 to `minimum` at share 0."""
    return minimum + (1.0 - minimum) * share
