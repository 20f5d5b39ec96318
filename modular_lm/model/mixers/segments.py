"""What a mixer is told about its rows besides their values."""

from __future__ import annotations

from dataclasses import dataclass

from modular_lm.model.layers import Rope


@dataclass(frozen=True)
class Segments:
    """Each row is a stretch of one segment (a chunk, or a whole sequence).

    rope: the rotations at the positions of the stretch, counted from the segment's start: [s, d/2]
    """

    rope: Rope
