"""The optimizers of a model as one."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from modular_lm.config.schema import OptimConfig
from modular_lm.optim.adamw import AdamW
from modular_lm.optim.groups import Group, make_groups
from modular_lm.optim.muon import Muon


class Optimizers:
    """AdamW, or Muon with AdamW for what is no matrix of the body.

    parts: PyTorch's optimizers, as checkpoints take them; an optimizer without parameters is left
    out. The learning rate is set before each step (`set_learning_rate`).
    """

    def __init__(self, groups: list[Group], config: OptimConfig) -> None:
        self.parts: list[Muon | AdamW] = []
        muon = [_settings(group, config) for group in groups if group.orthogonal]
        adamw = [_settings(group, config) for group in groups if not group.orthogonal]
        if muon:
            self.parts.append(Muon(muon))
        if adamw:
            self.parts.append(AdamW(adamw))

    def set_learning_rate(self, lr: float) -> None:
        """Set the learning rate of the next step, in each group times its factor."""
        for part in self.parts:
            for settings in part.param_groups:
                settings["lr"] = lr * settings["lr_factor"]

    def step(self, found_inf: Tensor | None = None) -> None:
        """Update the weights; not if `found_inf`, a scalar in fp32 on their device, holds 1."""
        for part in self.parts:
            part.found_inf = found_inf
            part.step()

    def zero_grad(self) -> None:
        """Forget all gradients."""
        for part in self.parts:
            part.zero_grad(set_to_none=True)


def _settings(group: Group, config: OptimConfig) -> dict[str, Any]:
    """The group as PyTorch's optimizers take it."""
    common = {
        "params": group.parameters,
        "lr_factor": group.factor,
        "weight_decay": config.weight_decay if group.decays else 0.0,
    }
    if group.orthogonal:
        return {**common, "momentum": config.muon_momentum, "ns_steps": config.muon_ns_steps}
    return {**common, "betas": (config.beta1, config.beta2), "eps": config.epsilon}


def build_optimizers(model: nn.Module, config: OptimConfig) -> Optimizers:
    """The optimizers of all parameters of `model` that learn.

    Raises ConfigError for a pattern of `lr_multipliers` that matches no parameter.
    """
    return Optimizers(make_groups(model, config), config)
