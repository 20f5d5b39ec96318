"""The optimizers of a model as one."""

from __future__ import annotations

from collections.abc import Iterator

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
        muon = [group for group in groups if group.orthogonal]
        adamw = [group for group in groups if not group.orthogonal]
        self.parts: list[Muon | AdamW] = []
        self._groups: list[list[Group]] = []
        for make, mine in ((Muon, muon), (AdamW, adamw)):
            if mine:
                parameters = [{"params": group.parameters} for group in mine]
                self.parts.append(make(parameters))
                self._groups.append(mine)
        self._defaults = [dict(part.defaults) for part in self.parts]
        self.apply_settings(config)

    def apply_settings(self, config: OptimConfig) -> None:
        """Set what `config` says; to be called again after loading a state, which brings its own.

        That may come from a run with other groups; nothing of their settings remains.
        """
        for settings, mine, defaults in self._aligned():
            settings |= {name: value for name, value in defaults.items() if name != "lr"}
            settings["weight_decay"] = config.weight_decay if mine.decays else 0.0
            if mine.orthogonal:
                settings["momentum"] = config.muon_momentum
                settings["ns_steps"] = config.muon_ns_steps
            else:
                settings["betas"] = (config.beta1, config.beta2)
                settings["eps"] = config.epsilon

    def set_learning_rate(self, lr: float) -> None:
        """Set the learning rate of the next step, in each group times its factor."""
        for settings, mine, _ in self._aligned():
            settings["lr"] = lr * mine.factor

    def step(self, found_inf: Tensor | None = None) -> None:
        """Update the weights; not if `found_inf`, a scalar in fp32 on their device, holds 1."""
        for part in self.parts:
            part.found_inf = found_inf
            part.step()

    def zero_grad(self) -> None:
        """Forget all gradients."""
        for part in self.parts:
            part.zero_grad(set_to_none=True)

    def state_of(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """What is kept for a parameter: `exp_avg`, `exp_avg_sq`, `step`, or `momentum_buffer`."""
        return next((p.state[parameter] for p in self.parts if parameter in p.state), {})

    def _aligned(self) -> Iterator[tuple[dict, Group, dict]]:
        """(settings of a param_group, its group, defaults of its optimizer)"""
        for part, groups, defaults in zip(self.parts, self._groups, self._defaults, strict=True):
            for settings, group in zip(part.param_groups, groups, strict=True):
                yield settings, group, defaults


def build_optimizers(model: nn.Module, config: OptimConfig) -> Optimizers:
    """The optimizers of all parameters of `model` that learn.

    Raises ConfigError for a pattern of `lr_multipliers` that matches no parameter.
    """
    return Optimizers(make_groups(model, config), config)
