"""Continuing a prompt token by token, with the state of what was read so far.

Knows token ids only; text is the caller's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from modular_lm.errors import ConfigError
from modular_lm.model.lm import LanguageModel
from modular_lm.model.modular import State

_PREFILL = 1024  # prompt tokens per call: bounds the logits, of which only the last are used


@torch.inference_mode()
def generate(
    model: LanguageModel,
    prompt_ids: Sequence[int],
    *,
    max_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    eos_id: int | None = None,
) -> list[int]:
    """The tokens that follow `prompt_ids`, at most `max_tokens`.

    Ends early with `eos_id`, which is then the last token. See `sample` for the options; the same
    seed gives the same tokens as long as the logits are the same. Raises ConfigError for a prompt
    without tokens.
    """
    if not prompt_ids:
        raise ConfigError("prompt: holds no token; begin it with BOS")
    generator = torch.Generator("cpu").manual_seed(seed)
    device = model.tok_embeddings.weight.device
    state = model.init_state(batch_size=1)
    pending = torch.tensor([list(prompt_ids)], dtype=torch.int64, device=device)
    new: list[int] = []
    while len(new) < max_tokens and (not new or new[-1] != eos_id):
        logits, state = _read(model, pending, state)
        token = sample(
            logits, temperature=temperature, top_k=top_k, top_p=top_p, generator=generator
        )
        new.append(token)
        pending = torch.tensor([[token]], dtype=torch.int64, device=device)
    return new


def _read(model: LanguageModel, tokens: Tensor, state: State) -> tuple[Tensor, State]:
    """tokens: [1, s]; returns the logits [V] after the last, and the state."""
    *before, last = tokens.split(_PREFILL, dim=1)
    for piece in before:
        _, state = model.extend(piece, state)
    logits, state = model.extend(last, state)
    return logits[0, -1], state


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
