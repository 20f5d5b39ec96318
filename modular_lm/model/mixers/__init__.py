"""Sequence mixers: what lets the tokens of a chunk see each other. One dict, one interface.

A mixer is an `nn.Module` built from a resolved `ModelConfig`, with

- `forward(x, segments, state) -> (y, state)`: x, y: [B, s, D]. Causal within a row; nothing
  crosses rows, but for the look-back from a chunk to the one before. `state` is what earlier calls
  left behind of the same rows, and the new one is returned: a value, the old one stays valid. With
  None the rows begin here and no state is kept (training).
- `empty_state(batch_size, dtype, device) -> state`: the state before the first token;
  `restart(state, begins, back)`: what is left of it for the rows b with `begins[b]`, at the start
  of a new segment (`back`: see `Segments`); `next_mask(state, length)`: what the next tokens see of
  it, the same in all layers. A state can `select(rows)`, and `join(states)` puts rows together.
- `initial_weights()`, see `layers`.
"""

from __future__ import annotations

from modular_lm.model.mixers.attention import Attention, KVCache
from modular_lm.model.mixers.segments import Segments

MIXERS = {"attention": Attention}
MixerState = KVCache

__all__ = ["MIXERS", "MixerState", "Segments"]
