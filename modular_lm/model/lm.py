"""The language model: embedding, modular body, head, and the loss per token."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from modular_lm.config.schema import ModelConfig
from modular_lm.model.aggregation import make_sites
from modular_lm.model.attention import ANYWHERE, Backends
from modular_lm.model.block import Block
from modular_lm.model.columns import Column, default_route, layers_of
from modular_lm.model.layers import Initial, RMSNorm, linear, normal
from modular_lm.model.modular import Body, State
from modular_lm.model.sizes import column_names, column_number
from modular_lm.model.spread import IGNORE, Spread, Whole

__all__ = ["IGNORE", "LOGITS_AT_ONCE", "LanguageModel"]

LOGITS_AT_ONCE = 2**29
"""More logits than these (2 GiB in fp32) are not held at once when training: the loss is then
computed slice by slice, and each slice's logits again in the backward pass."""


class LanguageModel(nn.Module):
    """A Llama-style decoder over chunks, built from a resolved `ModelConfig`.

    Parameters carry Meta's names, those of the aggregation sites are `aggs.*`, those of columns
    beside the base `columns.*`; none depends on the chunk length, and there are no buffers. A new
    model holds no meaningful weights: call `init.init_weights` or load some.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.backends: Backends = ANYWHERE
        """Who computes attention over whole sequences; see `attention.choose_backends`."""
        self.spread: Spread = Whole()
        """How the computation is spread over processes; see `spread`."""
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.columns = nn.ModuleDict({name: Column(config) for name in config.module_names})
        self.aggs = make_sites(config)
        self.norm = RMSNorm(config.dim, config.norm_eps)
        # Tied, there is no second parameter: ties do not survive `to_empty` from the meta device.
        self.output = None if config.weight_tying else linear(config.dim, config.vocab_size)

    @property
    def column_names(self) -> tuple[str, ...]:
        """The base and all others, by their numbers."""
        return column_names(self.config)

    @property
    def device(self) -> torch.device:
        return self.tok_embeddings.weight.device

    def initial_weights(self) -> dict[str, Initial]:
        start = normal(self.config, self.config.dim)
        head = {} if self.output is None else {"output.weight": start}
        return {"tok_embeddings.weight": start, **head}

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        documents: Tensor | None = None,
        routes: Tensor | None = None,
    ) -> Tensor:
        """Logits [B, T, V] of `tokens` [B, T] (int64), in the type of the computation.

        With `targets` [B, T]: instead the negative log-likelihood of each in nats, [B, T], in
        fp32 (fp64 for an fp64 model), 0 where the target is IGNORE.

        With `documents` [B, T], integers >= 0 that grow along a row, tokens of different documents
        do not see each other, neither within a chunk nor through summaries. With `routes` [B, K],
        numbers of columns, chunk k of row b runs through `routes[b, k]`, otherwise all run through
        `module_route`; not with look-back.
        """
        h = self._body().run_chunks(self.tok_embeddings(tokens), documents, routes)
        h = self.norm(h)
        if targets is None:
            return self.spread.logits(h, self._head)
        losses = self._losses(h.flatten(0, 1), targets.flatten())
        # Not a view: FSDP's hook on an output is lost when a view of it is changed in place.
        return losses.view_as(targets).clone()

    def init_state(
        self,
        batch_size: int,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> State:
        """The state before the first token of `batch_size` sequences.

        `dtype` is that of the computation; both default to those of the parameters.
        """
        weight = self.tok_embeddings.weight
        return self._body().init_state(batch_size, dtype or weight.dtype, device or weight.device)

    def extend(
        self, tokens: Tensor, state: State, route: str | None = None
    ) -> tuple[Tensor, State]:
        """Logits [B, s, V] of the next tokens [B, s], and the state after them.

        Equal to `forward` on all tokens so far, however they are split; rows may stand at different
        positions (`State.join`, `State.select`). Knows no documents: a row is one. route: the
        column to run, by default `module_route`; it may change where a chunk begins. A model under
        FSDP must have this method, and `read` and `write` of its sites, registered as forward
        methods.
        """
        h, state = self._body(route).run_pieces(self.tok_embeddings(tokens), state)
        return self.spread.logits(self.norm(h), self._head), state

    def _body(self, route: str | None = None) -> Body:
        config = self.config
        number = default_route(config) if route is None else column_number(config, route)
        columns = tuple(layers_of(self, name) for name in self.column_names)
        return Body(config, columns, self.aggs, number, self.backends, self.spread)

    @property
    def _head(self) -> Tensor:
        return (self.tok_embeddings if self.output is None else self.output).weight

    def _losses(self, h: Tensor, targets: Tensor) -> Tensor:
        """h: [N, D], targets: [N] -> [N]."""
        at_once = max(1, LOGITS_AT_ONCE // self.config.vocab_size)
        if len(targets) <= at_once:
            return self._slice_losses(h, targets)
        slices = zip(h.split(at_once), targets.split(at_once), strict=True)
        losses = [
            checkpoint(self._slice_losses, *piece, use_reentrant=False, preserve_rng_state=False)
            for piece in slices
        ]
        return torch.cat(losses)

    def _slice_losses(self, h: Tensor, targets: Tensor) -> Tensor:
        return self.spread.losses(h, self._head, targets)
