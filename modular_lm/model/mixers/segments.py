"""What a mixer is told about its rows besides their values."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from torch import Tensor

from modular_lm.model.attention import ReadyMask
from modular_lm.model.layers import Rope


@dataclass(frozen=True)
class Segments:
    """Each row is a stretch of one segment (a chunk, or a whole sequence).

    rope: the rotations at the positions of the stretch, counted from the segment's start: [s, d/2],
        or [N, s, d/2] where rows stand at different ones
    mask: what the tokens of a row see of each other; while decoding, of all that its state holds
    n_chunks: consecutive rows that are the chunks of one sequence
    border: with look-back, what all chunks but a sequence's first see when the last tokens of the
        chunk before are put in front of their own; `mask` is then the first chunk's
    back: with look-back, the rotation that turns keys of a chunk back by its length: [1, d/2]
    """

    rope: Rope
    mask: ReadyMask
    n_chunks: int = 1
    border: ReadyMask | None = None
    back: Rope | None = None

    def select(self, rows: Tensor) -> Segments:
        """For these rows of whole segments. Not with look-back, which ties rows together."""
        assert self.border is None, "rows that look back at each other cannot be parted"
        return dataclasses.replace(self, mask=self.mask.select(rows), n_chunks=1)
