"""Where a model lets others step in that spread one computation over several processes.

Between `scatter` and `gather` layers see a share of the tokens of each chunk (all of them, if
nothing is spread); sites and the head see all. The model itself knows one process: `Whole`.
`parallel.tensor` has the other one.
"""

from __future__ import annotations

from typing import Protocol

import torch.nn.functional as F
from torch import Tensor

from modular_lm.model.layers import precise

IGNORE = -1
"""A target that is not scored: its loss is 0."""


class Spread(Protocol):
    def scatter(self, h: Tensor) -> Tensor:
        """Chunks [N, S, D] -> the share of their tokens that is computed here, [N, s, D]."""
        ...

    def gather(self, h: Tensor) -> Tensor:
        """The reverse: [N, s, D] -> [N, S, D]."""
        ...

    def logits(self, h: Tensor, weight: Tensor) -> Tensor:
        """h: [..., D], weight of the head: [V, D] -> [..., V]."""
        ...

    def losses(self, h: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        """The negative log-likelihoods of targets [n] given h [n, D], in nats: [n], see `precise`;
        0 where the target is IGNORE."""
        ...


class Whole:
    """Nothing is spread."""

    def scatter(self, h: Tensor) -> Tensor:
        return h

    def gather(self, h: Tensor) -> Tensor:
        return h

    def logits(self, h: Tensor, weight: Tensor) -> Tensor:
        return F.linear(h, weight)

    def losses(self, h: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        logits = F.linear(h, weight)
        wide = logits.to(precise(logits.dtype))
        return F.cross_entropy(wide, targets, ignore_index=IGNORE, reduction="none")
