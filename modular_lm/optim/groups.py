"""Parameter groups: which optimizer takes a parameter, whether it decays, how fast it learns.

All of it follows from the config and from names and shapes. Checkpoints do not hold it, so that a
run may go on with other groups than it began with.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from torch import nn

from modular_lm.config.schema import OptimConfig
from modular_lm.errors import ConfigError

_EMBEDDING = "tok_embeddings."
_BODY = ("layers.", "columns.", "aggs.")


@dataclass
class Group:
    """Parameters that are treated alike.

    orthogonal: updated by Muon; decays: weight decay applies; factor: on the learning rate
    """

    orthogonal: bool
    decays: bool
    factor: float
    parameters: list[nn.Parameter] = field(default_factory=list)


def make_groups(model: nn.Module, config: OptimConfig) -> list[Group]:
    """The groups of all parameters that learn, in a fixed order.

    Only matrices decay: no norm, no bias, not the token embedding. Under Muon those of the body are
    its; embedding, head and vectors stay with AdamW. Raises ConfigError for a pattern of
    `lr_multipliers` that matches no parameter.
    """
    named = dict(model.named_parameters())
    check_patterns(config, named)
    groups: dict[tuple[bool, bool, float], Group] = {}
    for name, parameter in named.items():
        if not parameter.requires_grad:
            continue
        decays = parameter.ndim >= 2 and not name.startswith(_EMBEDDING)
        orthogonal = config.name == "muon" and parameter.ndim == 2 and name.startswith(_BODY)
        key = (orthogonal, decays, lr_factor(config, name))
        groups.setdefault(key, Group(*key)).parameters.append(parameter)
    return [groups[key] for key in sorted(groups, reverse=True)]


def lr_factor(config: OptimConfig, name: str) -> float:
    """The factor on the learning rate of a parameter: of the last pattern that matches, else 1."""
    factor = 1.0
    for pattern, value in config.lr_multipliers.items():
        if fnmatchcase(name, pattern):
            factor = value
    return factor


def check_patterns(config: OptimConfig, names: Iterable[str]) -> None:
    """Raise ConfigError for a pattern of `lr_multipliers` that matches none of these names."""
    known = list(names)
    for pattern, value in config.lr_multipliers.items():
        if not any(fnmatchcase(name, pattern) for name in known):
            raise ConfigError(
                f"optim.lr_multipliers.{pattern}={value:g}: matches no parameter; expected a "
                f"pattern with * and ? of whole names such as {known[0]} or {known[-1]}"
            )
