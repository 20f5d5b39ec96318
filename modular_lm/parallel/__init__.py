"""Spreading a model over processes, applied to models that know nothing of it.

`world` (this process among the others), `mesh` (who exchanges what), `sharding` (data parallel),
`tensor` (tensor and sequence parallel), `recompute` (activation checkpointing), `float8`; `build`
puts them together. One path serves every size: a single process is a world of one.
"""

from __future__ import annotations

from modular_lm.parallel.build import build_model
from modular_lm.parallel.sharding import DTYPES, begin_micro_step
from modular_lm.parallel.world import World, init_world

__all__ = [
    "DTYPES",
    "World",
    "begin_micro_step",
    "build_model",
    "init_world",
]
