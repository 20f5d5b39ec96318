"""The modular body: layers that see one chunk at a time, and sites where chunks exchange summaries.

A module is a run of consecutive layers. Chunks are folded into the batch, so that the layers know
nothing of them; between two modules the aggregation of that site acts on all chunks of a sequence.
One chunk (or `module_seq_len: null`) runs no site: the dense transformer, to the bit.

`run_chunks` is the parallel form for training; `run_pieces` takes tokens in pieces of any length,
prompt or single token alike, and gives the same result.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modular_lm.config.schema import ModelConfig
from modular_lm.model.aggregation import Aggregation, SiteState, advance, empty_site
from modular_lm.model.block import Block
from modular_lm.model.layers import make_rope
from modular_lm.model.mixers import MixerState, Segments
from modular_lm.model.sizes import sizes_of


@dataclass(frozen=True)
class State:
    """What is remembered of the tokens so far: a value, older ones stay valid.

    t: number of tokens; layers: per layer, of the current chunk only; sites: per aggregation site
    """

    t: int
    layers: tuple[MixerState, ...]
    sites: tuple[SiteState, ...]


@dataclass(frozen=True)
class Body:
    """The layers and sites of a model, with the config that arranges them; owns no parameters."""

    config: ModelConfig
    layers: nn.ModuleList
    aggs: nn.ModuleList

    def run_chunks(self, h: Tensor) -> Tensor:
        """All layers over whole sequences; h: [B, T, D] -> [B, T, D]."""
        batch, total, _ = h.shape
        length = min(self.config.module_seq_len or total, total)
        n_chunks = -(-total // length)
        if n_chunks > 1:
            h = F.pad(h, (0, 0, 0, n_chunks * length - total))
        segments = self._segments(0, length, h)
        h = h.unflatten(1, (n_chunks, length)).flatten(0, 1)
        for number, module in enumerate(sizes_of(self.config).modules):
            if number > 0 and n_chunks > 1 and len(self.aggs):
                h = self.aggs[number - 1](h.unflatten(0, (batch, n_chunks))).flatten(0, 1)
            for i in module:
                h, _ = self.layers[i](h, segments, None)
        return h.unflatten(0, (batch, n_chunks)).flatten(1, 2)[:, :total]

    def init_state(self, batch_size: int, dtype: torch.dtype, device: torch.device) -> State:
        """The state before the first token."""
        blocks = cast("list[Block]", list(self.layers))
        # Without chunks nothing is ever aggregated.
        sites = cast("list[Aggregation]", list(self.aggs) if self.config.module_seq_len else [])
        return State(
            t=0,
            layers=tuple(b.attention.empty_state(batch_size, dtype, device) for b in blocks),
            sites=tuple(empty_site(a, self.config, batch_size, dtype, device) for a in sites),
        )

    def run_pieces(self, h: Tensor, state: State) -> tuple[Tensor, State]:
        """All layers over the next tokens; h: [B, s, D] -> [B, s, D] and the state after them."""
        outputs = []
        for piece in self._pieces(h, state.t):
            out, state = self._run_piece(piece, state)
            outputs.append(out)
        return torch.cat(outputs, dim=1), state

    def _run_piece(self, h: Tensor, state: State) -> tuple[Tensor, State]:
        """`run_pieces` for tokens of one chunk."""
        chunk, start = divmod(state.t, self.config.module_seq_len or state.t + 1)
        caches, sites = list(state.layers), list(state.sites)
        if start == 0:
            caches = [cache.restart() for cache in caches]
        length = h.shape[1]
        segments = self._segments(start, length, h)
        for number, module in enumerate(sizes_of(self.config).modules):
            if number > 0 and sites:
                agg = cast("Aggregation", self.aggs[number - 1])
                h, sites[number - 1] = advance(agg, self.config, h, sites[number - 1], chunk, start)
            for i in module:
                h, caches[i] = self.layers[i](h, segments, caches[i])
        return h, State(state.t + length, tuple(caches), tuple(sites))

    def _pieces(self, h: Tensor, t: int) -> Iterator[Tensor]:
        """Cut [B, s, D], which follows t tokens, so that no piece crosses a chunk's border."""
        length = self.config.module_seq_len
        while h.shape[1]:
            room = h.shape[1] if length is None else length - t % length
            piece, h = h[:, :room], h[:, room:]
            t += piece.shape[1]
            yield piece

    def _segments(self, start: int, length: int, like: Tensor) -> Segments:
        positions = torch.arange(start, start + length, device=like.device)
        head_dim = sizes_of(self.config).head_dim
        return Segments(make_rope(positions, head_dim, self.config.rope_theta, like.dtype))
