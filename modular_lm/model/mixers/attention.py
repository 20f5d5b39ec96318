"""Causal self-attention with rotary embedding and grouped key/value heads (arXiv:2305.13245)."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modular_lm.config.schema import ModelConfig
from modular_lm.model.attention import attend
from modular_lm.model.kernels import with_border
from modular_lm.model.layers import Initial, Rope, apply_rope, linear, normal
from modular_lm.model.masks import Mask, causal
from modular_lm.model.mixers.segments import Segments
from modular_lm.model.sizes import sizes_of


@dataclass(frozen=True)
class KVCache:
    """Rotated keys, and values, that are still needed; k, v: [B, n, n_kv_heads, head_dim].

    Row b holds the last `lengths[b]` of the n; what lies before is no longer (or was never) there.
    Grows by concatenation: the copy is of the order of what attention reads anyway, and a state
    that is never written to can be kept and continued in several ways.
    """

    k: Tensor
    v: Tensor
    lengths: tuple[int, ...]

    def append(self, k: Tensor, v: Tensor) -> KVCache:
        lengths = tuple(n + k.shape[1] for n in self.lengths)
        return KVCache(torch.cat((self.k, k), dim=1), torch.cat((self.v, v), dim=1), lengths)

    def newest(self, lengths: Sequence[int]) -> KVCache:
        """Only the last `lengths[b]` of each row, or all where there are fewer."""
        kept = tuple(map(min, self.lengths, lengths))
        first = self.k.shape[1] - max(kept)
        return KVCache(self.k[:, first:], self.v[:, first:], kept)

    def select(self, rows: Sequence[int]) -> KVCache:
        """These rows only, in this order."""
        index = torch.tensor(rows, device=self.k.device)
        lengths = tuple(self.lengths[row] for row in rows)
        return KVCache(self.k[index], self.v[index], lengths).newest(lengths)

    @staticmethod
    def join(caches: Sequence[KVCache]) -> KVCache:
        """The rows of several, one after the other."""
        width = max(cache.k.shape[1] for cache in caches)

        def stack(parts: list[Tensor]) -> Tensor:
            return torch.cat([F.pad(x, (0, 0, 0, 0, width - x.shape[1], 0)) for x in parts])

        lengths = tuple(n for cache in caches for n in cache.lengths)
        return KVCache(stack([c.k for c in caches]), stack([c.v for c in caches]), lengths)

    def mask(self, q_len: int, window: int | None) -> Mask:
        """What the next `q_len` tokens will see of all that is held, themselves included."""
        n, device = self.k.shape[1] + q_len, self.k.device
        if min(self.lengths) == n - q_len:
            return causal(q_len, n, window=window)
        missing = n - q_len - torch.tensor(self.lengths, device=device)[:, None]
        # What a row does not hold is to it a document of its own.
        absent = (torch.arange(n, device=device) < missing).long()
        return causal(q_len, n, window=window, q_docs=absent[:, n - q_len :], k_docs=absent)


class Attention(nn.Module):
    """The mixer of Llama; see `mixers` for the interface.

    With `module_lookback` tokens also see the last so many of the chunk before theirs, with
    `sliding_window` only the last so many, themselves included.
    """

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
        return KVCache(empty, empty, (0,) * batch_size)

    def restart(self, state: KVCache, begins: Sequence[bool], back: Rope | None) -> KVCache:
        kept = self.config.module_lookback
        state = state.newest([kept if b else n for b, n in zip(begins, state.lengths, strict=True)])
        if back is None:
            return state
        turned = apply_rope(state.k, back)
        if not all(begins):
            rows = torch.tensor(begins, device=turned.device)
            turned = torch.where(rows[:, None, None, None], turned, state.k)
        return KVCache(turned, state.v, state.lengths)

    def next_mask(self, state: KVCache, length: int) -> Mask:
        return state.mask(length, self.config.sliding_window)

    def forward(
        self, x: Tensor, segments: Segments, state: KVCache | None
    ) -> tuple[Tensor, KVCache | None]:
        q, k, v = (w(x).unflatten(-1, (-1, self.head_dim)) for w in (self.wq, self.wk, self.wv))
        q, k = apply_rope(q, segments.rope), apply_rope(k, segments.rope)
        if state is not None:
            state = state.append(k, v)
            y = attend(q, state.k, state.v, segments.mask)
            if self.config.sliding_window is not None:
                state = state.newest([self.config.sliding_window - 1] * len(state.lengths))
        elif segments.border is not None:
            y = self._attend_over_borders(q, k, v, segments)
        else:
            y = attend(q, k, v, segments.mask)
        return self.wo(y.flatten(-2)), state

    def _attend_over_borders(self, q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
        """q, k, v: [B * K, S, heads, d], each row a chunk."""
        assert segments.border is not None
        assert segments.back is not None
        q, k, v = (x.unflatten(0, (-1, segments.n_chunks)) for x in (q, k, v))
        last = slice(k.shape[2] - self.config.module_lookback, None)
        before = (apply_rope(k[:, :-1, last], segments.back), v[:, :-1, last])
        first = functools.partial(attend, mask=segments.mask)
        others = functools.partial(attend, mask=segments.border)
        return with_border(q, k, v, before, first, others).flatten(0, 1)
