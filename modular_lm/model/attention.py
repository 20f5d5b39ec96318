"""Attention as a function of queries, keys, values and a mask, by the backend that suits best.

`attend` is all that the layers know. Which backend computes which kind of mask is decided once, by
`choose_backends`, for a device and a type; without that decision it is PyTorch's SDPA, which
computes every mask everywhere. Knows no parameters.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from modular_lm.config.schema import ModelConfig
from modular_lm.errors import ConfigError, reason
from modular_lm.model import masks
from modular_lm.model.kernels import BACKENDS, sdpa
from modular_lm.model.masks import Kind, Mask
from modular_lm.model.sizes import sizes_of

log = logging.getLogger(__name__)

Backends = Mapping[Kind, str]
"""Kind of mask -> name of the backend; `sdpa` where nothing is said."""

ANYWHERE: Backends = {}

# On a GPU SDPA has fast kernels for triangles only; for other masks the first of these that works.
_PREFERRED = ("flex", "xformers", "sdpa")
_PROBE_TOKENS = 256


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Mask, backends: Backends = ANYWHERE) -> Tensor:
    """softmax(q k^T / sqrt(d)) v over the keys that `mask` lets each query see.

    q: [B, s, n_heads, d]; k, v: [B, n, n_kv_heads, d]; returns [B, s, n_heads, d]. Each query
    must see at least one key.
    """
    return BACKENDS[backends.get(mask.kind, "sdpa")](q, k, v, mask)


def use_backends(model: nn.Module, backends: Backends) -> None:
    """Let all attention in `model` compute by `backends`."""
    for module in model.modules():
        if hasattr(module, "backends"):
            module.backends = backends  # type: ignore[assignment]


@dataclass(frozen=True)
class Use:
    """A kind of mask that a model needs: an example, and the heads (queries, keys, width)."""

    example: Mask
    heads: tuple[int, int, int]


def choose_backends(
    wanted: str,
    config: ModelConfig,
    *,
    document_mask: bool,
    device: torch.device,
    dtype: torch.dtype,
    training: bool = True,
) -> Backends:
    """The backend of every kind of mask that the model meets, each proven by a trial where it is
    not SDPA: a forward (and backward) pass of a few tokens, compared with the dense mask.

    wanted: `auto` (the best that works) or one backend for all. Raises ConfigError if that one
    cannot do it here.
    """
    if device.type == "cpu" and wanted == "auto":
        return ANYWHERE
    chosen: dict[Kind, str] = {}
    for use in _uses(config, document_mask):
        kind = use.example.kind
        if wanted == "auto":
            candidates = ("sdpa",) if kind in ("plain", "causal") else _PREFERRED
            chosen[kind] = next(
                b for b in candidates if not _trouble(b, use, device, dtype, training)
            )
            continue
        trouble = _trouble(wanted, use, device, dtype, training)
        if trouble:
            raise ConfigError(
                f"distributed.attn_impl={wanted}: {trouble} ({_WORDS[kind]}, {device.type}, "
                f"{str(dtype).removeprefix('torch.')}); use auto"
            )
        chosen[kind] = wanted
    log.info("attention: %s", ", ".join(f"{_WORDS[k]} by {b}" for k, b in chosen.items()))
    return chosen


_WORDS: dict[Kind, str] = {
    "plain": "causal attention",
    "causal": "look-back",
    "window": "sliding window",
    "documents": "document mask",
    "memory": "memory attention of module_agg=stack",
}


def _uses(config: ModelConfig, document_mask: bool) -> list[Use]:
    """One for each kind of mask that training this model meets."""
    z, n = sizes_of(config), _PROBE_TOKENS
    heads = (z.n_heads, z.n_kv_heads, z.head_dim)
    examples = [masks.causal(n)]
    if config.module_lookback:
        examples.append(masks.causal(n, n + n // 2))
    if config.sliding_window is not None:
        examples.append(masks.causal(n, window=n // 4))
    if document_mask:
        halves = torch.arange(n).div(n // 2, rounding_mode="floor")
        examples.append(masks.causal(n, q_docs=halves.expand(2, n)))
    uses = [Use(example, heads) for example in examples]
    if config.module_agg == "stack" and config.module_seq_len is not None:
        example = masks.memory(n, n // 8, 8, config.module_n_summary)
        uses.append(Use(example, (z.n_heads, z.n_heads, z.agg_dim // z.n_heads)))
    return uses


def _trouble(
    name: str, use: Use, device: torch.device, dtype: torch.dtype, training: bool
) -> str | None:
    """Why a backend cannot be used; None if it can."""
    if name == "sdpa":
        return None
    if name == "xformers" and device.type == "cpu":
        return "xformers has kernels for GPUs only"
    if name == "xformers" and use.example.kind == "memory":
        return "xformers has no kernel that reads summaries"
    if name == "flex" and device.type == "cpu" and training:
        return "flex_attention has no backward pass on the CPU"
    try:
        error = _try(name, use, device, dtype, training)
    except Exception as caught:  # whatever a foreign kernel throws, it means: not here
        log.debug("%s", name, exc_info=True)
        return f"{name} does not work here: {reason(caught)}"
    allowed = 1e-4 if dtype in (torch.float32, torch.float64) else 5e-2
    return None if error <= allowed else f"{name} computes something else (off by {error:.2g})"


def _try(name: str, use: Use, device: torch.device, dtype: torch.dtype, training: bool) -> float:
    """The largest difference to SDPA over outputs and gradients, relative to the largest value."""
    mask, (n_heads, n_kv_heads, width) = use.example, use.heads
    if mask.q_docs is not None and mask.k_docs is not None:
        mask = masks.causal(mask.q_len, q_docs=mask.q_docs.to(device))
    generator = torch.Generator("cpu").manual_seed(0)
    shapes = ((2, mask.q_len, n_heads, width), *[(2, mask.k_len, n_kv_heads, width)] * 2)
    inputs = [torch.randn(shape, generator=generator) for shape in shapes]

    def results(kernel: Callable[..., Tensor]) -> list[Tensor]:
        leaves = [x.to(device, dtype).requires_grad_(training) for x in inputs]
        y = kernel(*leaves, mask)
        if not training:
            return [y]
        return [y, *torch.autograd.grad(y.float().square().sum(), leaves)]

    with torch.inference_mode(False), torch.set_grad_enabled(training):
        found, expected = results(BACKENDS[name]), results(sdpa)
    errors = [
        (a.float() - b.float()).abs().max() / b.float().abs().max()
        for a, b in zip(found, expected, strict=True)
    ]
    worst = torch.stack(errors).max().item()
    return cast("float", worst if worst == worst else float("inf"))
