"""What a token reads from the chunks before its own.

At a site between two modules each chunk is pooled to `m` summaries, which are normalised, and
token t of chunk k receives  r_t = sum over summaries (j, r) with j < k of  w * V s_jr.  The modes
differ in the weights only: a constant (`sum`), 1/(k m) (`avg`), attention (`stack`); `drop` has no
site. Three rules hold for all:

- strictly earlier chunks only, and never as a difference of sums (which would leak by rounding);
- the summaries are normalised before they are added up, else `sum` and `avg` were the same;
- the output projection starts at zero, so that every mode starts as `drop`.

Each mode has a parallel form, `forward`, for all chunks of a sequence at once, and an incremental
one: `empty_memory`, `read` and `write`, which `advance` drives piece by piece.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modular_lm.config.schema import ModelConfig, Pool
from modular_lm.model.attention import masked_attention
from modular_lm.model.layers import (
    ZEROS,
    Initial,
    RMSNorm,
    apply_rope,
    linear,
    make_rope,
    normal,
    precise,
)
from modular_lm.model.sizes import n_sites, sizes_of

Memory = tuple[Tensor, ...]


class WeightedSum(nn.Module):
    """`avg` and `sum`: all tokens of a chunk read one weighted sum of all earlier summaries."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.n_summary = config.module_n_summary
        self.pool: Pool = config.module_pool
        self.scale = config.module_sum_scale if config.module_agg == "sum" else None
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.wo = linear(config.dim, config.dim)

    def initial_weights(self) -> dict[str, Initial]:
        return {"wo.weight": ZEROS}

    def forward(self, h: Tensor) -> Tensor:
        """h: [B, K, S, D], before the site; returns it with what each token reads added."""
        sums = self.norm(pool_chunks(h, self.n_summary, self.pool)).sum(2)
        earlier = F.pad(sums[:, :-1].cumsum(1), (0, 0, 1, 0))  # [B, K, D]
        n_chunks = torch.arange(h.shape[1], device=h.device).clamp(min=1)[:, None]
        return h + self._project(earlier, n_chunks, h.dtype).unsqueeze(2)

    def empty_memory(self, batch_size: int, dtype: torch.dtype, device: torch.device) -> Memory:
        dim = self.wo.in_features
        return (torch.zeros(batch_size, dim, dtype=precise(dtype), device=device),)

    def read(self, h: Tensor, memory: Memory, n_chunks: int) -> Tensor:
        """h: [B, s, D], tokens of one chunk; returns it with what they read added."""
        return h + self._project(memory[0], n_chunks, h.dtype).unsqueeze(1)

    def write(self, memory: Memory, pooled: Tensor, n_chunks: int) -> Memory:
        """The memory after chunk number `n_chunks`, whose pooled tokens are [B, m, D]."""
        return (memory[0] + self.norm(pooled).sum(1),)

    def _project(self, total: Tensor, n_chunks: Tensor | int, dtype: torch.dtype) -> Tensor:
        m, scale = self.n_summary, self.scale
        weighted = total / (n_chunks * m) if scale is None else total * scale
        return self.wo(weighted.to(dtype))


class MemoryAttention(nn.Module):
    """`stack`: each token attends to the earlier summaries, by content and by distance in chunks.

    A slot with key and value zero is always visible (softmax with one more in the denominator):
    the first chunk reads exactly zero, and a token may choose to read little.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        sizes = sizes_of(config)
        dim, width = sizes.dim, sizes.agg_dim
        self.n_heads = sizes.n_heads
        self.head_dim = width // sizes.n_heads
        self.norm = RMSNorm(dim, config.norm_eps)
        self.query_norm = RMSNorm(dim, config.norm_eps)
        self.wq = linear(dim, width)
        self.wk = linear(dim, width)
        self.wv = linear(dim, width)
        self.wo = linear(width, dim)

    def initial_weights(self) -> dict[str, Initial]:
        start = normal(self.config, self.config.dim)
        return {"wq.weight": start, "wk.weight": start, "wv.weight": start, "wo.weight": ZEROS}

    def forward(self, h: Tensor) -> Tensor:
        """h: [B, K, S, D], before the site; returns it with what each token reads added."""
        n_chunks, length = h.shape[1:3]
        m = self.config.module_n_summary
        pooled = pool_chunks(h, m, self.config.module_pool).flatten(1, 2)
        keys, values = self._keys_values(pooled, 0, h.dtype)
        token_chunk = torch.arange(n_chunks * length, device=h.device) // length
        slot_chunk = torch.arange(-1, n_chunks * m, device=h.device) // m  # the zero slot's is -1
        visible = slot_chunk < token_chunk[:, None]
        here = m * torch.arange(n_chunks, device=h.device)[:, None]  # [K, 1]: the same for S tokens
        return h + self._attend(h, here, keys, values, visible)

    def empty_memory(self, batch_size: int, dtype: torch.dtype, device: torch.device) -> Memory:
        empty = torch.empty(batch_size, 0, self.n_heads, self.head_dim, dtype=dtype, device=device)
        return empty, empty

    def read(self, h: Tensor, memory: Memory, n_chunks: int) -> Tensor:
        """h: [B, s, D], tokens of one chunk; returns it with what they read added."""
        here = torch.full((1,), n_chunks * self.config.module_n_summary, device=h.device)
        return h + self._attend(h, here, *memory, visible=None)

    def write(self, memory: Memory, pooled: Tensor, n_chunks: int) -> Memory:
        """The memory after chunk number `n_chunks`, whose pooled tokens are [B, m, D]."""
        first = n_chunks * self.config.module_n_summary
        new = self._keys_values(pooled, first, memory[0].dtype)
        return tuple(torch.cat((old, more), dim=1) for old, more in zip(memory, new, strict=True))

    def _keys_values(self, pooled: Tensor, first: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """pooled: [B, n, D], the summaries from number `first` on; returns [B, n, heads, d]."""
        s = self.norm(pooled).to(dtype)
        k, v = (w(s).unflatten(-1, (-1, self.head_dim)) for w in (self.wk, self.wv))
        numbers = torch.arange(first, first + s.shape[1], device=s.device)
        return self._turn(k, numbers), v

    def _attend(
        self, h: Tensor, here: Tensor, keys: Tensor, values: Tensor, visible: Tensor | None
    ) -> Tensor:
        """h: [B, ..., D]; here: the number of the first summary of each token's own chunk."""
        q = self.wq(self.query_norm(h)).unflatten(-1, (-1, self.head_dim))
        q = self._turn(q, here).flatten(1, -3)
        keys, values = (F.pad(x, (0, 0, 0, 0, 1, 0)) for x in (keys, values))
        return self.wo(masked_attention(q, keys, values, visible).flatten(-2)).view_as(h)

    def _turn(self, x: Tensor, numbers: Tensor) -> Tensor:
        return apply_rope(x, make_rope(numbers, self.head_dim, self.config.rope_theta, x.dtype))


Aggregation = WeightedSum | MemoryAttention
AGGREGATIONS = {"avg": WeightedSum, "sum": WeightedSum, "stack": MemoryAttention}


def make_sites(config: ModelConfig) -> nn.ModuleList:
    """The aggregation between each two modules; empty with `drop`."""
    return nn.ModuleList(AGGREGATIONS[config.module_agg](config) for _ in range(n_sites(config)))


def pool_chunks(h: Tensor, n_summary: int, pool: Pool) -> Tensor:
    """One vector per sub-chunk, its mean or its last token; [B, K, S, D] -> [B, K, m, D].

    In the precision of sums (`precise`), as what follows adds many of them up.
    """
    parts = h.unflatten(2, (n_summary, -1))
    wide = precise(h.dtype)
    return parts.mean(3, dtype=wide) if pool == "mean" else parts[:, :, :, -1].to(wide)


def pool_piece(pooled: Tensor, h: Tensor, start: int, length: int, pool: Pool) -> Tensor:
    """`pool_chunks` for a chunk that arrives in pieces.

    pooled: [B, m, D], zeros before the first piece; h: [B, s, D], the tokens from `start` on of
    a chunk of `length`; returns the new `pooled`, final once the whole chunk went in.
    """
    pooled = pooled.clone()
    part, end = length // pooled.shape[1], start + h.shape[1]
    for r in range(start // part, -(-end // part)):
        if pool == "mean":
            tokens = h[:, max(r * part - start, 0) : (r + 1) * part - start]
            pooled[:, r] += tokens.sum(1, dtype=pooled.dtype) / part
        elif (r + 1) * part <= end:
            pooled[:, r] = h[:, (r + 1) * part - start - 1]
    return pooled


@dataclass(frozen=True)
class SiteState:
    """What a site keeps between pieces.

    pooled: [B, m, D], of the current chunk so far; memory: of the chunks before it
    """

    pooled: Tensor
    memory: Memory


def empty_site(
    agg: Aggregation, config: ModelConfig, batch_size: int, dtype: torch.dtype, device: torch.device
) -> SiteState:
    """The state of a site before the first token."""
    shape = (batch_size, config.module_n_summary, config.dim)
    pooled = torch.zeros(shape, dtype=precise(dtype), device=device)
    return SiteState(pooled, agg.empty_memory(batch_size, dtype, device))


def advance(
    agg: Aggregation, config: ModelConfig, h: Tensor, state: SiteState, chunk: int, start: int
) -> tuple[Tensor, SiteState]:
    """Pass a piece of chunk number `chunk`, its tokens from `start` on, through a site.

    h: [B, s, D], within the chunk. Returns what the next module sees, and the new state.
    """
    length = config.module_seq_len
    assert length is not None, "a model without chunks has no site states"
    pooled = pool_piece(state.pooled, h, start, length, config.module_pool)
    out = agg.read(h, state.memory, chunk) if chunk else h
    if start + h.shape[1] < length:
        return out, SiteState(pooled, state.memory)
    memory = agg.write(state.memory, pooled, chunk)
    return out, SiteState(torch.zeros_like(pooled), memory)
