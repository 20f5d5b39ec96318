"""Linear layers in float8, through torchao: weights and activations are cast around each matmul.

Master weights and their gradients stay as they are. CPUs without float8 kernels emulate them, which
shows the numerics and not the speed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import re
from collections.abc import Iterator

import torch
from torch import nn

from modular_lm.config.schema import DistributedConfig
from modular_lm.errors import ConfigError, reason

_MULTIPLE = 16
"""Kernels want both sides of a matrix to be a multiple of this."""


def convert_to_float8(model: nn.Module, config: DistributedConfig, device: torch.device) -> int:
    """Let the linear layers whose name `float8_filter` finds compute in float8, in place.

    Returns how many there are. Raises ConfigError where torchao is absent, the recipe cannot run on
    `device`, or there is no such layer.
    """
    recipe = config.float8_recipe
    if recipe is None:
        return 0
    key = f"distributed.float8_recipe={recipe}"
    try:
        with _without_warnings():
            from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    except ImportError as error:
        raise ConfigError(
            f"{key}: needs torchao ({reason(error)}); pip install 'modular-lm[float8]'"
        ) from None
    _check_device(key, recipe, device)
    names = check_filter(model, config.float8_filter)
    settings = Float8LinearConfig.from_recipe_name(recipe)
    if device.type == "cpu":
        settings = dataclasses.replace(settings, emulate=True)
    convert_to_float8_training(
        model, module_filter_fn=lambda module, name: name in names, config=settings
    )
    return len(names)


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    """torchao tells of every kernel that it cannot load, most of which are for other machines."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def check_filter(model: nn.Module, pattern: str) -> set[str]:
    """The names of the layers that are to compute in float8. Raises ConfigError if there are none.

    The model may be on the meta device.
    """
    names = _wanted(model, pattern)
    if not names:
        raise ConfigError(
            f"distributed.float8_filter={pattern}: finds no linear layer whose sides are multiples "
            f"of {_MULTIPLE}; they have names like layers.0.feed_forward.w1"
        )
    return names


def _wanted(model: nn.Module, pattern: str) -> set[str]:
    """The names of the linear layers that the pattern finds and kernels can compute."""
    expression = re.compile(pattern)
    return {
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and expression.search(f"{name}.")
        and module.in_features % _MULTIPLE == 0
        and module.out_features % _MULTIPLE == 0
    }


def _check_device(key: str, recipe: str, device: torch.device) -> None:
    if device.type != "cuda":
        return
    need = (8, 9) if recipe == "tensorwise" else (9, 0)
    have = torch.cuda.get_device_capability(device)
    if have < need:
        raise ConfigError(
            f"{key}: needs a GPU of compute capability {need[0]}.{need[1]}, this is {have[0]}."
            f"{have[1]} ({torch.cuda.get_device_name(device)}); leave the key out"
        )
