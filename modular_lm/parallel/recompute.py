"""Activation checkpointing: what a layer's backward pass computes again instead of keeping it."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from modular_lm.config.schema import DistributedConfig
from modular_lm.errors import ConfigError

# Kept where the config names none: what is expensive to compute for its size. Of tensor parallelism
# the sums over peers, but not what is gathered for a matrix product: that would be kept whole.
SAVED = (
    "aten.mm",
    "aten._scaled_mm",
    "aten._scaled_dot_product_flash_attention",
    "aten._scaled_dot_product_flash_attention_for_cpu",
    "aten._scaled_dot_product_efficient_attention",
    "aten._scaled_dot_product_cudnn_attention",
    "_c10d_functional.reduce_scatter_tensor",
)


def recompute(unit: nn.Module, config: DistributedConfig) -> None:
    """Let a layer be computed again in its backward pass as the config says, in place.

    Replaces its `forward`: no wrapper, so that the names of parameters stay.
    """
    mode = config.activation_checkpointing
    if mode == "none":
        return
    context: dict[str, Any] = {}
    if mode == "selective":
        saved = saved_operators(config)
        context["context_fn"] = functools.partial(_contexts, saved)
    unit.forward = functools.partial(
        checkpoint, unit.forward, use_reentrant=False, preserve_rng_state=False, **context
    )


def saved_operators(config: DistributedConfig) -> frozenset[Any]:
    """All overloads of the operators whose results are kept. Raises ConfigError."""
    found = []
    for name in config.activation_checkpointing_save or SAVED:
        packet: Any = torch.ops
        for part in name.split("."):
            packet = getattr(packet, part, None)
        if not hasattr(packet, "overloads"):
            raise ConfigError(
                f"distributed.activation_checkpointing_save: {name} is no operator of torch.ops; "
                "expected names like aten.mm"
            )
        found += [getattr(packet, overload) for overload in packet.overloads()]
    return frozenset(found)


def _contexts(saved: frozenset[Any]) -> Any:
    return create_selective_checkpoint_contexts(functools.partial(_policy, saved))


def _policy(
    saved: frozenset[Any], context: Any, operator: Any, *args: Any, **kwargs: Any
) -> CheckpointPolicy:
    if operator in saved:
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE
