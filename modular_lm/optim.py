"""The optimizer, its parameter groups, and learning-rate schedules as functions of the step."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn

from modular_lm.config.schema import OptimConfig

Schedule = Callable[[float, float], float]


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW; weight decay on matrices only, not on norms and not on the token embedding.

    The learning rate is set before each step by the trainer (`learning_rate`). Parameters that
    need no gradient are left out.
    """
    decayed, plain = [], []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        is_matrix = parameter.ndim >= 2 and not name.startswith("tok_embeddings.")
        (decayed if is_matrix else plain).append(parameter)
    on_gpu = all(p.device.type == "cuda" for p in decayed)
    optimizer = torch.optim.AdamW([{"params": decayed}, {"params": plain}], fused=on_gpu)
    apply_settings(optimizer, config)
    return optimizer


def apply_settings(optimizer: torch.optim.Optimizer, config: OptimConfig) -> None:
    """Set what `config` says; to be called again after loading a state, which brings its own."""
    for group, decay in zip(optimizer.param_groups, (config.weight_decay, 0.0), strict=True):
        group["weight_decay"] = decay
        group["betas"] = (config.beta1, config.beta2)
        group["eps"] = config.epsilon


def _constant(progress: float, minimum: float) -> float:
    return 1.0


def _linear(progress: float, minimum: float) -> float:
    return 1.0 - (1.0 - minimum) * progress


def _cosine(progress: float, minimum: float) -> float:
    return minimum + (1.0 - minimum) * 0.5 * (1.0 + math.cos(math.pi * progress))


# From the share of the steps after the warm-up that is done, and lr_min_ratio, to a factor on lr.
SCHEDULES: dict[str, Schedule] = {"constant": _constant, "linear": _linear, "cosine": _cosine}


def learning_rate(config: OptimConfig, steps: int, step: int) -> float:
    """The learning rate of optimizer step `step` (0-based) of `steps`.

    Linear from lr / warmup at step 0 to lr at step warmup - 1, then the schedule down to
    lr * lr_min_ratio at step `steps`.
    """
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    progress = (step - config.warmup) / max(1, steps - config.warmup)
    return config.lr * SCHEDULES[config.scheduler](min(1.0, progress), config.lr_min_ratio)
