"""Choosing the column of each chunk by what was read so far: the causal posterior over domains.

The evidence for column c at chunk k is  e_{k+1}(c) = 0.3 e_k(c) + log p_c(chunk k),  and chunk k
runs through the candidate with the largest e_k, the first of several (as the domain posterior of
branch-train-merge, arXiv:2208.03306, and DEMix, arXiv:2108.05036, decided per chunk). Strictly
causal: what a chunk holds counts from the next one on. log p_c(chunk k) is taken given the memory
of the routes that were chosen, over the chunk's tokens but its first, which the chunk before
predicts.

Each finished chunk costs one pass per candidate. A column is disabled by leaving it out of the
candidates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from modular_lm.errors import ConfigError
from modular_lm.model.layers import precise
from modular_lm.model.lm import LanguageModel
from modular_lm.model.modular import State

DECAY = 0.3


@dataclass(frozen=True)
class RoutedState:
    """What is remembered while columns are chosen by evidence: a value, older ones stay valid.

    state: after all tokens; start: at the beginning of the current chunk; chunk: [B, i], its tokens
    so far; evidence: [B, C], per candidate; the rows stand at the same position
    """

    state: State
    start: State
    chunk: Tensor
    evidence: Tensor

    @property
    def routes(self) -> Tensor:
        """[B], the place among the candidates of the column of the current chunk."""
        return self.evidence.argmax(1)


def check_candidates(model: LanguageModel, candidates: Sequence[str]) -> None:
    """Raise ConfigError unless chunks of `model` can be routed among `candidates`."""
    names = model.column_names
    unknown = [name for name in candidates if name not in names]
    if unknown or not candidates:
        raise ConfigError(
            f"modules={','.join(candidates)}: expected some of the columns of this model: "
            f"{', '.join(names)}"
        )
    if len(set(candidates)) < len(candidates):
        raise ConfigError(f"modules={','.join(candidates)}: names a column twice")
    if model.config.module_seq_len is None:
        raise ConfigError("route=auto: needs chunks, this model has model.module_seq_len=null")
    if model.config.module_lookback and len(candidates) > 1:
        raise ConfigError(
            f"route=auto: is not possible with model.module_lookback={model.config.module_lookback}"
            ": a chunk cannot look back into another column"
        )


def init_routed(model: LanguageModel, candidates: Sequence[str], batch_size: int) -> RoutedState:
    """The state before the first token. Raises ConfigError, see `check_candidates`."""
    check_candidates(model, candidates)
    state, device = model.init_state(batch_size), model.device
    chunk = torch.empty(batch_size, 0, dtype=torch.int64, device=device)
    evidence = torch.zeros(batch_size, len(candidates), dtype=torch.float64, device=device)
    return RoutedState(state, state, chunk, evidence)


@torch.no_grad()
def extend_routed(
    model: LanguageModel, candidates: Sequence[str], tokens: Tensor, routed: RoutedState
) -> tuple[Tensor, RoutedState]:
    """Logits [B, s, V] of the next tokens [B, s], each chunk by its column, and the state after."""
    length = model.config.module_seq_len
    assert length is not None
    outputs = []
    while tokens.shape[1]:
        room = length - routed.chunk.shape[1]
        piece, tokens = tokens[:, :room], tokens[:, room:]
        logits, state = _extend_each(model, candidates, piece, routed.state, routed.routes)
        outputs.append(logits)
        chunk = torch.cat((routed.chunk, piece), dim=1)
        routed = RoutedState(state, routed.start, chunk, routed.evidence)
        if chunk.shape[1] == length:
            scores = _scores(model, candidates, chunk, routed.start)
            evidence = DECAY * routed.evidence + scores
            routed = RoutedState(state, state, chunk[:, :0], evidence)
    return torch.cat(outputs, dim=1), routed


@torch.no_grad()
def choose_routes(model: LanguageModel, candidates: Sequence[str], tokens: Tensor) -> Tensor:
    """The columns of the chunks of whole sequences: tokens [B, T] -> numbers [B, K].

    What `LanguageModel.forward` takes as `routes`.
    """
    routed, length = init_routed(model, candidates, len(tokens)), model.config.module_seq_len
    assert length is not None
    numbers = torch.tensor([model.column_names.index(c) for c in candidates], device=tokens.device)
    routes = [numbers[routed.routes]]
    for chunk in tokens.split(length, dim=1)[:-1]:
        _, routed = extend_routed(model, candidates, chunk, routed)
        routes.append(numbers[routed.routes])
    return torch.stack(routes, dim=1)


def _extend_each(
    model: LanguageModel, candidates: Sequence[str], tokens: Tensor, state: State, routes: Tensor
) -> tuple[Tensor, State]:
    """`extend`, each row by the candidate `routes[row]`."""
    chosen: list[int] = routes.tolist()
    order: list[int] = []
    outputs: list[Tensor] = []
    states: list[State] = []
    for place in sorted(set(chosen)):
        rows = [row for row, its in enumerate(chosen) if its == place]
        logits, after = model.extend(tokens[rows], state.select(rows), candidates[place])
        order += rows
        outputs.append(logits)
        states.append(after)
    back = sorted(range(len(order)), key=order.__getitem__)
    return torch.cat(outputs)[back], State.join(states).select(back)


def _scores(model: LanguageModel, candidates: Sequence[str], chunk: Tensor, start: State) -> Tensor:
    """log p_c(chunk) of every candidate, [B, S] -> [B, C] in fp64."""
    scores = []
    for name in candidates:
        logits, _ = model.extend(chunk, start, name)
        log_p = logits[:, :-1].to(precise(logits.dtype)).log_softmax(-1)
        chosen = log_p.gather(-1, chunk[:, 1:, None])
        scores.append(chosen.sum((1, 2), dtype=torch.float64))
    return torch.stack(scores, dim=1)
