"""Causal self-attention with rotary embedding and grouped key/value heads (arXiv:2305.13245)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from modular_lm.config.schema import ModelConfig
from modular_lm.model.attention import causal_attention
from modular_lm.model.layers import Initial, apply_rope, linear, normal
from modular_lm.model.mixers.segments import Segments
from modular_lm.model.sizes import sizes_of


@dataclass(frozen=True)
class KVCache:
    """Rotated keys, and values, of the segment so far; k, v: [B, n, n_kv_heads, head_dim].

    Grows by concatenation: the copy is of the order of what attention reads anyway, and a state
    that is never written to can be kept and continued in several ways.
    """

    k: Tensor
    v: Tensor

    def append(self, k: Tensor, v: Tensor) -> KVCache:
        return KVCache(torch.cat((self.k, k), dim=1), torch.cat((self.v, v), dim=1))

    def restart(self) -> KVCache:
        """For the same rows at the start of their next segment."""
        return KVCache(self.k[:, :0], self.v[:, :0])


class Attention(nn.Module):
    """The mixer of Llama; see `mixers` for the interface."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        sizes = sizes_of(config)
        self.head_dim = sizes.head_dim
        self.n_kv_heads = sizes.n_kv_heads
        self.wq = linear(sizes.dim, sizes.attn_dim)
        self.wk = linear(sizes.dim, sizes.kv_dim)
        self.wv = linear(sizes.dim, sizes.kv_dim)
        self.wo = linear(sizes.attn_dim, sizes.dim)

    def initial_weights(self) -> dict[str, Initial]:
        # Lingua's choice for wo too; without `head_dim` its fan-in is dim anyway.
        start = normal(self.config, self.config.dim)
        return {f"{name}.weight": start for name in ("wq", "wk", "wv", "wo")}

    def empty_state(self, batch_size: int, dtype: torch.dtype, device: torch.device) -> KVCache:
        shape = (batch_size, 0, self.n_kv_heads, self.head_dim)
        empty = torch.empty(shape, dtype=dtype, device=device)
        return KVCache(empty, empty)

    def forward(
        self, x: Tensor, segments: Segments, state: KVCache | None
    ) -> tuple[Tensor, KVCache | None]:
        q, k, v = (w(x).unflatten(-1, (-1, self.head_dim)) for w in (self.wq, self.wk, self.wv))
        q, k = apply_rope(q, segments.rope), apply_rope(k, segments.rope)
        if state is not None:
            state = state.append(k, v)
            k, v = state.k, state.v
        return self.wo(causal_attention(q, k, v).flatten(-2)), state
