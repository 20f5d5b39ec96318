"""Continuing prompts token by token, with the state of what was read so far.

Knows token ids only; text is the caller's.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from modular_lm.errors import ConfigError
from modular_lm.model.lm import LanguageModel
from modular_lm.model.modular import State
from modular_lm.model.routing import RoutedState, extend_routed, init_routed

Draw = Callable[[Tensor], int]

_PREFILL = 1024  # prompt tokens per call: bounds the logits, of which only the last are used


@torch.inference_mode()
def generate(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    eos_id: int | None = None,
    route: str | None = None,
    candidates: Sequence[str] = (),
) -> list[list[int]]:
    """The tokens that follow each of `prompts`, at most `max_tokens`.

    A row ends early with `eos_id`, which is then its last token. What it holds does not depend on
    the other prompts; row b is drawn with the seed `seed + b`. See `sample` for the options.

    route: the column to run, by default the config's `module_route`; candidates: instead, columns
    among which each chunk is routed by evidence (see `routing`). Raises ConfigError for a prompt
    without tokens and for columns that the model does not have.
    """
    if not all(prompts):
        raise ConfigError("prompt: holds no token; begin it with BOS")
    names = model.column_names
    if route is not None and route not in names:
        raise ConfigError(f"route={route}: expected auto or a column: {', '.join(names)}")
    draws: list[Draw] = [
        functools.partial(
            sample,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            generator=torch.Generator("cpu").manual_seed(seed + row),
        )
        for row in range(len(prompts))
    ]
    if not candidates:
        return _continue_batch(model, route, prompts, draws, max_tokens, eos_id)
    return [
        _continue_routed(model, candidates, prompt, draw, max_tokens, eos_id)
        for prompt, draw in zip(prompts, draws, strict=True)
    ]


def _continue_batch(
    model: LanguageModel,
    route: str | None,
    prompts: Sequence[Sequence[int]],
    draws: Sequence[Draw],
    max_tokens: int,
    eos_id: int | None,
) -> list[list[int]]:
    """All rows go on together, whatever the lengths of their prompts, and leave when they end."""
    device = model.device

    def read(tokens: list[list[int]], state: State) -> tuple[Tensor, State]:
        """Logits [B, V] after the last of tokens [B, s]."""
        *before, last = torch.tensor(tokens, device=device).split(_PREFILL, dim=1)
        for piece in before:
            _, state = model.extend(piece, state, route)
        logits, state = model.extend(last, state, route)
        return logits[:, -1], state

    began = [read([list(prompt)], model.init_state(1)) for prompt in prompts]
    logits, state = torch.cat([row for row, _ in began]), State.join([state for _, state in began])
    rows, new = list(range(len(prompts))), [[] for _ in prompts]
    while len(new[rows[0]]) < max_tokens:
        for row, of_row in zip(rows, logits, strict=True):
            new[row].append(draws[row](of_row))
        going = [at for at, row in enumerate(rows) if new[row][-1] != eos_id]
        if not going or len(new[rows[0]]) == max_tokens:
            break
        if len(going) < len(rows):
            state, rows = state.select(going), [rows[at] for at in going]
        logits, state = read([new[row][-1:] for row in rows], state)
    return new


def _continue_routed(
    model: LanguageModel,
    candidates: Sequence[str],
    prompt: Sequence[int],
    draw: Draw,
    max_tokens: int,
    eos_id: int | None,
) -> list[int]:
    device = model.device

    def read(tokens: Sequence[int], routed: RoutedState) -> tuple[Tensor, RoutedState]:
        piece = torch.tensor([tokens], device=device)
        logits, routed = extend_routed(model, candidates, piece, routed)
        return logits[0, -1], routed

    logits, routed = read(prompt, init_routed(model, candidates, 1))
    new: list[int] = []
    while len(new) < max_tokens:
        new.append(draw(logits))
        if new[-1] == eos_id or len(new) == max_tokens:
            break
        logits, routed = read(new[-1:], routed)
    return new


def sample(
    logits: Tensor,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> int:
    """One token id from logits [V].

    Temperature 0: the most likely. Else a draw from softmax(logits / temperature) among the
    `top_k` most likely, and of these among the fewest that hold at least `top_p` of their
    probability together. The draw is made on the CPU, so that a seed means the same everywhere.
    """
    logits = logits.detach().to("cpu", torch.float64)
    if temperature == 0:
        return int(logits.argmax())
    # Ordered by logit: small differences may vanish in the probabilities.
    ordered, order = logits.sort(descending=True, stable=True)
    probabilities = ((ordered - ordered[0]) / temperature).softmax(0)
    if top_k is not None:
        probabilities = probabilities[:top_k] / probabilities[:top_k].sum()
    if top_p is not None:
        before = probabilities.cumsum(0) - probabilities
        probabilities = probabilities[before < top_p]
    return int(order[torch.multinomial(probabilities, 1, generator=generator)])
