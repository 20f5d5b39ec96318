"""What a token reads from the chunks before its own.

At a site between two modules each chunk is pooled to `m` summaries, which are normalised, and
token t of chunk k receives  r_t = sum over summaries (j, r) with j < k of  w * V s_jr.  The modes
differ in the weights only: a constant (`sum`), 1/(k m) (`avg`), attention (`stack`); `drop` has no
site. Three rules hold for all:

- strictly earlier chunks only, and never as a difference of sums (which would leak by rounding);
  of these, where documents are given, only summaries of the token's own document;
- the summaries are normalised before they are added up, else `sum` and `avg` were the same;
- the output projection starts at zero, so that every mode starts as `drop`.

Each mode has a parallel form, `forward`, for all chunks of a sequence at once, and an incremental
one: `empty_memory`, `read` and `write`, which `advance` drives piece by piece. In the latter
`chunks` says for each row how many chunks lie before its current one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modular_lm.config.schema import ModelConfig, Pool
from modular_lm.model import masks
from modular_lm.model.attention import ReadyMask, attend, memory_mask
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
from modular_lm.model.masks import EVERY
from modular_lm.model.sizes import n_sites, sizes_of
from modular_lm.model.summaries import pool_chunks, pool_piece, running_sums, summary_documents

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

    def forward(
        self, h: Tensor, documents: Tensor | None = None, mask: ReadyMask | None = None
    ) -> Tensor:
        """h: [B, K, S, D], before the site; returns it with what each token reads added.

        documents: [B, K, S]; mask: not needed here.
        """
        summaries = self.norm(pool_chunks(h, self.n_summary, self.pool, documents))
        if documents is None:
            earlier = F.pad(summaries.sum(2)[:, :-1].cumsum(1), (0, 0, 1, 0))  # [B, K, D]
            n_chunks = torch.arange(h.shape[1], device=h.device)[:, None]
            return h + self._project(earlier, n_chunks * self.n_summary, h.dtype).unsqueeze(2)
        m = self.n_summary
        of_summary = summary_documents(documents, m).flatten(1)
        sums, numbers = running_sums(summaries.flatten(1, 2), of_summary)
        # What has been summed after the last summary of a chunk is for the next one.
        earlier, count = (F.pad(x[:, m - 1 : -1 : m], (0, 0, 1, 0)) for x in (sums, numbers))
        last = F.pad(documents[:, :-1, -1], (1, 0), value=EVERY)
        reads = self._project(earlier, count, h.dtype).unsqueeze(2)
        return h + torch.where((documents == last[:, :, None])[..., None], reads, 0)

    def empty_memory(self, batch_size: int, dtype: torch.dtype, device: torch.device) -> Memory:
        dim = self.wo.in_features
        return (torch.zeros(batch_size, dim, dtype=precise(dtype), device=device),)

    def read(self, h: Tensor, memory: Memory, chunks: Sequence[int]) -> Tensor:
        """h: [B, s, D], tokens of one chunk; returns it with what they read added."""
        n_chunks = torch.tensor(chunks, device=h.device)[:, None]
        return h + self._project(memory[0], n_chunks * self.n_summary, h.dtype).unsqueeze(1)

    def write(
        self, memory: Memory, pooled: Tensor, chunks: Sequence[int], rows: Sequence[int]
    ) -> Memory:
        """The memory once the current chunks of `rows`, pooled to [B, m, D], are over."""
        ended = torch.zeros(len(chunks), 1, dtype=torch.bool, device=pooled.device)
        ended[list(rows)] = True
        return (memory[0] + torch.where(ended, self.norm(pooled).sum(1), 0),)

    def _project(self, total: Tensor, number: Tensor, dtype: torch.dtype) -> Tensor:
        """total: [..., D], the sum of `number` summaries (any shape that broadcasts)."""
        weighted = total / number.clamp(min=1) if self.scale is None else total * self.scale
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

    def forward(
        self, h: Tensor, documents: Tensor | None = None, mask: ReadyMask | None = None
    ) -> Tensor:
        """h: [B, K, S, D], before the site; returns it with what each token reads added.

        documents: [B, K, S]; mask: `memory_mask`, where all sites share one.
        """
        batch, n_chunks, length = h.shape[:3]
        if mask is None:
            rule = memory_mask(self.config, n_chunks, length, documents)
            mask = ReadyMask(rule, batch, h.device)
        m = self.config.module_n_summary
        pooled = pool_chunks(h, m, self.config.module_pool, documents).flatten(1, 2)
        numbers = torch.arange(m * n_chunks, device=h.device)
        keys, values = self._keys_values(pooled, numbers, h.dtype)
        here = m * torch.arange(n_chunks, device=h.device)[:, None]  # [K, 1]: the same for S tokens
        return h + self._attend(h, here, keys, values, mask)

    def empty_memory(self, batch_size: int, dtype: torch.dtype, device: torch.device) -> Memory:
        empty = torch.empty(batch_size, 0, self.n_heads, self.head_dim, dtype=dtype, device=device)
        return empty, empty

    def read(self, h: Tensor, memory: Memory, chunks: Sequence[int]) -> Tensor:
        """h: [B, s, D], tokens of one chunk; returns it with what they read added."""
        m, n_slots = self.config.module_n_summary, 1 + memory[0].shape[1]
        n_chunks = torch.tensor(chunks, device=h.device)[:, None]
        q_docs = k_docs = None
        if m * min(chunks) < n_slots - 1:
            # Rows with fewer chunks have room at the end of their memory that holds nothing.
            slot = torch.arange(n_slots, device=h.device)
            k_docs = (slot > m * n_chunks).long()
            q_docs = torch.zeros(h.shape[:2], dtype=torch.int64, device=h.device)
        mask = masks.everything(h.shape[1], n_slots, q_docs=q_docs, k_docs=k_docs)
        keys, values = memory
        ready = ReadyMask(mask, len(h), h.device)
        return h + self._attend(h, m * n_chunks, keys, values, ready)

    def write(
        self, memory: Memory, pooled: Tensor, chunks: Sequence[int], rows: Sequence[int]
    ) -> Memory:
        """The memory once the current chunks of `rows`, pooled to [B, m, D], are over."""
        m = self.config.module_n_summary
        first = m * torch.tensor(chunks, device=pooled.device)
        places = first[:, None] + torch.arange(m, device=pooled.device)
        new = self._keys_values(pooled, places, memory[0].dtype)
        # All rows end here, and none has room left from a longer one that was beside it.
        if memory[0].shape[1] == m * min(chunks) and len(rows) == len(chunks):
            return tuple(torch.cat(pair, dim=1) for pair in zip(memory, new, strict=True))
        width = max(memory[0].shape[1], m * (1 + max(chunks[row] for row in rows)))
        index = torch.tensor(rows, device=pooled.device)
        grown = [_widen(old, width) for old in memory]  # a copy: older states stay valid
        for old, more in zip(grown, new, strict=True):
            old[index[:, None], places[index]] = more[index]
        return tuple(grown)

    def _keys_values(
        self, pooled: Tensor, numbers: Tensor, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """pooled: [B, n, D], the summaries of these numbers ([n] or [B, n]) -> [B, n, heads, d]."""
        s = self.norm(pooled).to(dtype)
        k, v = (w(s).unflatten(-1, (-1, self.head_dim)) for w in (self.wk, self.wv))
        return self._turn(k, numbers), v

    def _attend(
        self, h: Tensor, here: Tensor, keys: Tensor, values: Tensor, mask: ReadyMask
    ) -> Tensor:
        """h: [B, ..., D]; here: the number of the first summary of each token's own chunk."""
        q = self.wq(self.query_norm(h)).unflatten(-1, (-1, self.head_dim))
        q = self._turn(q, here).flatten(1, -3)
        keys, values = (F.pad(x, (0, 0, 0, 0, 1, 0)) for x in (keys, values))
        y = attend(q, keys, values, mask)
        return self.wo(y.flatten(-2)).view_as(h)

    def _turn(self, x: Tensor, numbers: Tensor) -> Tensor:
        return apply_rope(x, make_rope(numbers, self.head_dim, self.config.rope_theta, x.dtype))


def _widen(x: Tensor, width: int) -> Tensor:
    """[B, n, ...] -> [B, width, ...], with zeros at the end."""
    return torch.cat((x, x.new_zeros(x.shape[0], width - x.shape[1], *x.shape[2:])), dim=1)


Aggregation = WeightedSum | MemoryAttention
AGGREGATIONS = {"avg": WeightedSum, "sum": WeightedSum, "stack": MemoryAttention}


def make_sites(config: ModelConfig) -> nn.ModuleList:
    """The aggregation between each two modules; empty with `drop`."""
    return nn.ModuleList(AGGREGATIONS[config.module_agg](config) for _ in range(n_sites(config)))


@dataclass(frozen=True)
class SiteState:
    """What a site keeps between pieces.

    pooled: [B, m, D], of the current chunk so far; memory: of the chunks before it, each [B, ...]
    """

    pooled: Tensor
    memory: Memory

    def select(self, rows: Sequence[int]) -> SiteState:
        """These rows only, in this order."""
        index = torch.tensor(rows, device=self.pooled.device)
        return SiteState(self.pooled[index], tuple(x[index] for x in self.memory))

    @staticmethod
    def join(states: Sequence[SiteState]) -> SiteState:
        """The rows of several, one after the other; memories of unequal length get room."""
        return SiteState(
            torch.cat([state.pooled for state in states]),
            tuple(
                torch.cat([_widen(x, max(y.shape[1] for y in each)) for x in each])
                for each in zip(*(state.memory for state in states), strict=True)
            ),
        )


def empty_site(
    agg: Aggregation, config: ModelConfig, batch_size: int, dtype: torch.dtype, device: torch.device
) -> SiteState:
    """The state of a site before the first token."""
    shape = (batch_size, config.module_n_summary, config.dim)
    pooled = torch.zeros(shape, dtype=precise(dtype), device=device)
    return SiteState(pooled, agg.empty_memory(batch_size, dtype, device))


def advance(
    agg: Aggregation, config: ModelConfig, h: Tensor, state: SiteState, t: Sequence[int]
) -> tuple[Tensor, SiteState]:
    """Pass the next tokens of each row, which lie in one chunk, through a site.

    h: [B, s, D], row b after t[b] tokens. Returns what the next module sees, and the new state.
    """
    length = config.module_seq_len
    assert length is not None, "a model without chunks has no site states"
    chunks, starts = [n // length for n in t], [n % length for n in t]
    pooled = pool_piece(state.pooled, h, starts, length, config.module_pool)
    out = agg.read(h, state.memory, chunks) if any(chunks) else h
    ended = [row for row, start in enumerate(starts) if start + h.shape[1] == length]
    if not ended:
        return out, SiteState(pooled, state.memory)
    memory = agg.write(state.memory, pooled, chunks, ended)
    return out, SiteState(pooled.index_fill(0, torch.tensor(ended, device=h.device), 0), memory)
