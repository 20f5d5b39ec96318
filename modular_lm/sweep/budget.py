"""What a trial costs, and how many steps a budget allows: arithmetic over resolved configs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from modular_lm.config.checks import global_batch_size, resolve_model, world_sizes
from modular_lm.config.schema import ModelConfig, TrainConfig
from modular_lm.config.sweep import Budget
from modular_lm.errors import ConfigError
from modular_lm.model.flops import flops_per_token, parameters, state_elements
from modular_lm.model.sizes import sizes_of

TOLERANCE = 0.01
"""Trials that are to spend the same may differ by so much, for steps are whole numbers."""

# Feed-forward widths that iso_parameters chooses are multiples of this where one comes near enough.
_WIDTH = 8
# Half a step of a hundred, up for one and down for another, is one in a hundred.
_FINER = (
    "choose more `steps`, or a larger sweep.amount where that is given (100 steps of each variant "
    "are always enough), or smaller steps (data.batch_size, grad_acc_steps)"
)
_ITEM_BYTES = {"fp32": 4, "bf16": 2}


@dataclass(frozen=True)
class Cost:
    """Of a training run with a resolved config.

    flops_per_token: of training, by `model.flops`, without validation
    cache_bytes_per_token: state of decoding a sequence of seq_len tokens, at its fullest, over
    seq_len, in the layers' compute type
    """

    tokens_per_step: int
    flops_per_token: float
    parameters: int
    ffn_dim: int
    cache_bytes_per_token: float

    @property
    def flops_per_step(self) -> float:
        return self.tokens_per_step * self.flops_per_token


def cost_of(config: TrainConfig) -> Cost:
    """The cost of a resolved config."""
    model, seq_len = config.model, config.data.seq_len
    state = state_elements(model, seq_len) * _ITEM_BYTES[config.distributed.model_dtype]
    return Cost(
        tokens_per_step=global_batch_size(config, world_sizes(config.ray)[1]) * seq_len,
        flops_per_token=flops_per_token(model, seq_len),
        parameters=parameters(model).total,
        ffn_dim=sizes_of(model).ffn_dim,
        cache_bytes_per_token=state / seq_len,
    )


def unit_per_step(budget: Budget, cost: Cost) -> float:
    """How much of the budget one step spends."""
    if budget == "tokens":
        return cost.tokens_per_step
    if budget == "flops":
        return cost.flops_per_step
    return 1


def steps_within(amount: float, per_step: float) -> int:
    """The number of steps, at least one, that comes nearest to the amount."""
    return max(1, round(amount / per_step))


def check_spread(spent: Mapping[str, float], budget: Budget, amount: float) -> None:
    """Raise ConfigError where whole steps bring trials too far from each other, or from `amount`.

    spent: by name, in the unit of the budget, as amount, which is what each may spend.
    """
    least, most = min(spent, key=spent.__getitem__), max(spent, key=spent.__getitem__)
    spread = spent[most] / spent[least] - 1
    if spread > TOLERANCE:
        raise ConfigError(
            f"sweep.amount: whole steps let {most} spend {spent[most]:.4g} {budget} and {least} "
            f"{spent[least]:.4g}, {spread:.1%} apart; allowed are {TOLERANCE:.0%}: {_FINER}"
        )
    furthest = max(least, most, key=lambda name: abs(spent[name] - amount))
    if abs(spent[furthest] / amount - 1) > TOLERANCE:
        raise ConfigError(
            f"sweep.amount={amount:.4g}: whole steps let {furthest} spend {spent[furthest]:.4g} "
            f"{budget}; allowed are {TOLERANCE:.0%} more or less: {_FINER}"
        )


def match_parameters(config: TrainConfig, wanted: int, vocab_size: int) -> dict[str, Any]:
    """Keys of the model that bring its parameters nearest to `wanted`: its feed-forward width.

    {} where they agree already. config: not resolved. Raises ConfigError where no width comes
    within the tolerance.
    """

    def resolved(model: ModelConfig) -> ModelConfig:
        return resolve_model(model, config.data.seq_len, vocab_size)

    now = resolved(config.model)
    if parameters(now).total == wanted:
        return {}
    sizes = sizes_of(now)
    columns = 1 + len(now.module_names)
    per_unit = 3 * sizes.dim * sizes.n_layers * columns  # parameters per unit of width
    exact = sizes.ffn_dim + (wanted - parameters(now).total) / per_unit
    tp, width, found = config.distributed.tp_size, 0, 0
    for multiple in (math.lcm(_WIDTH, tp), tp):
        width = max(multiple, round(exact / multiple) * multiple)
        # Rounded up to the multiple; of 1, half a unit more keeps the product from falling below.
        more = 0.5 if multiple == 1 else 0
        keys = {
            "ffn_dim_multiplier": (width + more) / int(8 * sizes.dim / 3),
            "multiple_of": multiple,
        }
        found = parameters(resolved(dataclasses.replace(config.model, **keys))).total
        if abs(found / wanted - 1) <= TOLERANCE:
            return {f"model.{key}": value for key, value in keys.items()}
    raise ConfigError(
        f"sweep.iso_parameters: the nearest feed-forward, of width {width}, makes {found:,} "
        f"parameters, the baseline has {wanted:,}; allowed is {TOLERANCE:.0%}: use a larger "
        "model.dim, or variants nearer to the baseline"
    )
