"""The modular body: layers that see one chunk at a time, and sites where chunks exchange summaries.

A module is a run of consecutive layers. Chunks are folded into the batch, so that the layers know
nothing of them; between two modules the aggregation of that site acts on all chunks of a sequence.
One chunk (or `module_seq_len: null`) runs no site: the dense transformer, to the bit.

`run_chunks` is the parallel form for training; `run_pieces` takes tokens in pieces of any length,
prompt or single token alike, and gives the same result. Its rows may stand at different positions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modular_lm.config.schema import ModelConfig
from modular_lm.model.aggregation import Aggregation, SiteState, advance, empty_site
from modular_lm.model.attention import Backends, ReadyMask, memory_mask
from modular_lm.model.block import Block
from modular_lm.model.columns import run_columns
from modular_lm.model.kernels import border_masks
from modular_lm.model.layers import Rope, make_rope
from modular_lm.model.masks import causal
from modular_lm.model.mixers import MixerState, Segments
from modular_lm.model.sizes import sizes_of
from modular_lm.model.spread import Spread


@dataclass(frozen=True)
class State:
    """What is remembered of the tokens so far: a value, older ones stay valid.

    t: number of tokens of each row; layers: per layer, of the current chunk (and what the next
    one looks back at); sites: per aggregation site
    """

    t: tuple[int, ...]
    layers: tuple[MixerState, ...]
    sites: tuple[SiteState, ...]

    def select(self, rows: Sequence[int]) -> State:
        """The state of these rows, in this order."""
        return State(
            t=tuple(self.t[row] for row in rows),
            layers=tuple(layer.select(rows) for layer in self.layers),
            sites=tuple(site.select(rows) for site in self.sites),
        )

    @staticmethod
    def join(states: Sequence[State]) -> State:
        """The rows of several states of one model, one after the other, as one batch."""
        layers = zip(*(state.layers for state in states), strict=True)
        sites = zip(*(state.sites for state in states), strict=True)
        return State(
            t=tuple(t for state in states for t in state.t),
            layers=tuple(type(each[0]).join(each) for each in layers),
            sites=tuple(SiteState.join(each) for each in sites),
        )


@dataclass(frozen=True)
class Body:
    """The layers and sites of a model, with the config that arranges them; owns no parameters.

    columns: the layers of each column, the base first; route: the number of the one to run;
    backends: who computes attention over whole sequences (decoding is SDPA's); spread: over which
    processes (decoding: one)
    """

    config: ModelConfig
    columns: tuple[nn.ModuleList, ...]
    aggs: nn.ModuleList
    route: int
    backends: Backends
    spread: Spread

    def run_chunks(
        self, h: Tensor, documents: Tensor | None = None, routes: Tensor | None = None
    ) -> Tensor:
        """All layers over whole sequences; h: [B, T, D] -> [B, T, D].

        documents: [B, T], >= 0 and growing along a row; tokens of different ones are kept apart.
        routes: [B, K], the column of each chunk; default: `route` for all.
        """
        batch, total, _ = h.shape
        length = min(self.config.module_seq_len or total, total)
        n_chunks = -(-total // length)
        assert routes is None or routes.shape == (batch, n_chunks), "expected a route per chunk"
        if n_chunks > 1:
            missing = n_chunks * length - total
            h = F.pad(h, (0, 0, 0, missing))
            if documents is not None:
                documents = torch.cat((documents, documents[:, -1:].expand(-1, missing)), dim=1)
        if documents is not None:
            documents = documents.unflatten(1, (n_chunks, length))
        segments = self._whole_chunks(n_chunks, length, h, documents)
        memory = self._memory_mask(n_chunks, length, h, documents)
        h = self.spread.scatter(h.unflatten(1, (n_chunks, length)).flatten(0, 1))
        for number, module in enumerate(sizes_of(self.config).modules):
            if number > 0 and n_chunks > 1 and len(self.aggs):
                chunks = self.spread.gather(h).unflatten(0, (batch, n_chunks))
                h = self.aggs[number - 1](chunks, documents, memory).flatten(0, 1)
                h = self.spread.scatter(h)
            h = self._run_module(module, h, segments, routes)
        h = self.spread.gather(h)
        return h.unflatten(0, (batch, n_chunks)).flatten(1, 2)[:, :total]

    def _run_module(
        self, module: range, h: Tensor, segments: Segments, routes: Tensor | None
    ) -> Tensor:
        if routes is not None:
            return run_columns(self.columns, module, h, segments, routes.flatten())
        for i in module:
            h, _ = self._layers[i](h, segments, None)
        return h

    def init_state(self, batch_size: int, dtype: torch.dtype, device: torch.device) -> State:
        """The state before the first token."""
        # Without chunks nothing is ever aggregated.
        sites = cast("list[Aggregation]", list(self.aggs) if self.config.module_seq_len else [])
        return State(
            t=(0,) * batch_size,
            layers=tuple(
                block.attention.empty_state(batch_size, dtype, device) for block in self._layers
            ),
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
        """`run_pieces` for tokens that lie in one chunk of each row."""
        length = self.config.module_seq_len
        starts = [t % length if length else t for t in state.t]
        caches, sites = list(state.layers), list(state.sites)
        if length and 0 in starts and any(state.t):
            begins, back = [start == 0 for start in starts], self._back(h)
            pairs = zip(self._layers, caches, strict=True)
            caches = [block.attention.restart(cache, begins, back) for block, cache in pairs]
        mask = self._layers[0].attention.next_mask(caches[0], h.shape[1])
        segments = Segments(self._rope(starts, h), ReadyMask(mask, len(h), h.device))
        for number, module in enumerate(sizes_of(self.config).modules):
            if number > 0 and sites:
                agg = cast("Aggregation", self.aggs[number - 1])
                h, sites[number - 1] = advance(agg, self.config, h, sites[number - 1], state.t)
            for i in module:
                h, caches[i] = self._layers[i](h, segments, caches[i])
        after = tuple(t + h.shape[1] for t in state.t)
        return h, State(after, tuple(caches), tuple(sites))

    @property
    def _layers(self) -> list[Block]:
        return cast("list[Block]", list(self.columns[self.route]))

    def _pieces(self, h: Tensor, t: Sequence[int]) -> Iterator[Tensor]:
        """Cut [B, s, D], which follows t tokens, so that no piece crosses a chunk's border."""
        length, done = self.config.module_seq_len, 0
        while done < h.shape[1]:
            room = h.shape[1] - done
            if length is not None:
                room = min(room, *(length - (of_row + done) % length for of_row in t))
            yield h[:, done : done + room]
            done += room

    def _whole_chunks(
        self, n_chunks: int, length: int, like: Tensor, documents: Tensor | None
    ) -> Segments:
        """documents: [B, K, S]"""
        rope, batch = self._rope([0], like, length), len(like)
        lookback = self.config.module_lookback
        if n_chunks > 1 and lookback:
            first, others = border_masks(length, lookback, documents)
            mask = ReadyMask(first, batch, like.device, self.backends)
            border = ReadyMask(others, batch * (n_chunks - 1), like.device, self.backends)
            return Segments(rope, mask, n_chunks, border, self._back(like))
        rows = None if documents is None else documents.flatten(0, 1)
        rule = causal(length, window=self.config.sliding_window, q_docs=rows)
        mask = ReadyMask(rule, batch * n_chunks, like.device, self.backends)
        return Segments(rope, mask, n_chunks)

    def _memory_mask(
        self, n_chunks: int, length: int, like: Tensor, documents: Tensor | None
    ) -> ReadyMask | None:
        if n_chunks == 1 or not len(self.aggs) or self.config.module_agg != "stack":
            return None
        rule = memory_mask(self.config, n_chunks, length, documents)
        return ReadyMask(rule, len(like), like.device, self.backends)

    def _back(self, like: Tensor) -> Rope | None:
        """The rotation of keys that the next chunk looks back at; None without look-back."""
        length, z = self.config.module_seq_len, sizes_of(self.config)
        if not self.config.module_lookback or length is None:
            return None
        position = torch.full((1,), -length, device=like.device)
        return make_rope(position, z.head_dim, self.config.rope_theta, like.dtype)

    def _rope(self, starts: Sequence[int], like: Tensor, length: int | None = None) -> Rope:
        """At the positions from `starts` on, one for all rows if they agree."""
        positions = torch.arange(length or like.shape[1], device=like.device)
        if len(set(starts)) == 1:
            positions = positions + starts[0]
        else:
            positions = positions + torch.tensor(starts, device=like.device)[:, None]
        head_dim = sizes_of(self.config).head_dim
        return make_rope(positions, head_dim, self.config.rope_theta, like.dtype)
