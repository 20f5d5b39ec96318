"""The keys of `optim.*`, and the conditions between them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from modular_lm.config.keys import key
from modular_lm.errors import ConfigError

Optimizer = Literal["adamw", "muon"]
Scheduler = Literal["cosine", "linear", "constant", "inv_sqrt", "wsd"]
DecayShape = Literal["1-sqrt", "linear", "cosine"]


@dataclass
class OptimConfig:
    name: Optimizer = key(
        "adamw", "muon: Muon for the matrices of the body, AdamW for embedding, head and norms"
    )
    lr: float = key(3e-4, "peak learning rate", ge=0)
    lr_multipliers: dict[str, float] = key(
        {},
        "pattern of parameter names -> factor on lr, e.g. aggs.*; of those that match, the last",
    )
    weight_decay: float = key(0.1, "decoupled weight decay, on matrices only", ge=0)
    beta1: float = key(0.9, "AdamW beta1", ge=0, lt=1)
    beta2: float = key(0.95, "AdamW beta2", ge=0, lt=1)
    epsilon: float = key(1e-8, "AdamW epsilon", gt=0)
    muon_momentum: float = key(0.95, "Muon's Nesterov momentum", ge=0, lt=1)
    muon_ns_steps: int = key(5, "Muon's Newton-Schulz iterations", ge=1, lt=100)
    clip: float = key(1.0, "clip the global gradient norm to this", gt=0)
    scheduler: Scheduler = key("cosine", "learning-rate schedule after the warm-up")
    warmup: int = key(100, "steps of linear warm-up from 0", ge=0)
    lr_min_ratio: float = key(0.1, "final learning rate / peak learning rate", ge=0, le=1)
    cycle_length: float = key(
        1.0, "cosine: length of a cycle as a share of the steps after the warm-up", gt=0, le=1
    )
    exp_factor: float = key(0.5, "inv_sqrt: the exponent", gt=0)
    decay_fraction: float = key(
        0.1, "wsd: share of all steps, at the end, in which the learning rate falls", gt=0, le=1
    )
    decay_shape: DecayShape = key("1-sqrt", "wsd: how it falls")
    max_skipped: int = key(
        10,
        "stop when so many steps in a row had a loss or gradient that is not finite; such steps "
        "change no weight",
        ge=1,
    )
    spike_window: int = key(
        128, "losses of so many last steps tell what a spike is; 0: no watch", ge=0
    )
    spike_threshold: float = key(
        8.0, "a spike: a loss so many (robust) standard deviations above their median", gt=0
    )


def check_optim(c: OptimConfig) -> None:
    """Raise ConfigError where keys contradict each other or a factor is none."""
    for pattern, factor in c.lr_multipliers.items():
        if not (factor >= 0 and math.isfinite(factor)):
            raise ConfigError(
                f"optim.lr_multipliers.{pattern}={factor}: expected a factor >= 0 on optim.lr"
            )
    if c.cycle_length != 1.0 and c.scheduler != "cosine":
        raise ConfigError(
            f"optim.cycle_length={c.cycle_length:g}: only the schedule cosine has cycles; "
            f"remove the key or set optim.scheduler=cosine (it is {c.scheduler})"
        )


def warnings_of_optim(c: OptimConfig, steps: int) -> list[str]:
    """What is allowed but probably not meant, in a run of `steps`."""
    found = []
    if c.warmup > steps:
        found.append(
            f"optim.warmup={c.warmup} is longer than the run, steps={steps}: "
            f"the learning rate never reaches optim.lr={c.lr:g}"
        )
    elif c.scheduler == "wsd" and c.warmup > steps - round(c.decay_fraction * steps):
        found.append(
            f"optim.decay_fraction={c.decay_fraction:g}: the decay begins within the warm-up of "
            f"optim.warmup={c.warmup} steps and is cut short"
        )
    still = [pattern for pattern, factor in c.lr_multipliers.items() if factor == 0]
    if still:
        found.append(
            f"optim.lr_multipliers: parameters that match {', '.join(still)} do not learn "
            "(factor 0); they cost the time and memory of those that do"
        )
    return found
