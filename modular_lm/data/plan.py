"""Which sample comes when: global sample index -> (source, epoch, position), as pure functions.

The order of training data depends on (sources, their weights and stages, seed, seq_len, global
sample index) and on nothing else: not on the world size, the micro-batch, restarts or prefetching.
So the whole state of a data loader is one integer, and any process can compute any part of the
order by itself.

`mixture` says which source a sample comes from, and the how-many-th draw c from that source it is.
Then c // n is the epoch of the source, and c % n, through a permutation keyed by (seed, source,
epoch), the position (`permutation`). No position comes twice before all came once. Reading the
tokens at a position is `reader`'s business.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from modular_lm.data.mixture import Int64s, Mixture, Stage
from modular_lm.data.permutation import Blocks, epoch_order
from modular_lm.errors import ConfigError

# To be raised with every change of the order that is drawn: a run that began with another one
# cannot go on unnoticed.
ORDER = 2


@dataclass(frozen=True)
class Source:
    """A source as the plan sees it: `n_samples` of them make one epoch."""

    name: str
    n_samples: int


@dataclass(frozen=True)
class Location:
    """Where n samples lie; all arrays [n]: index into the plan's sources, epoch, position."""

    source: Int64s
    epoch: Int64s
    position: Int64s


class DataPlan:
    """The order of the samples of `sources`, drawn as `stages` say.

    Raises ConfigError for a source too small to fill a sample, or with a weight too small to ever
    be drawn.
    """

    def __init__(
        self, sources: Sequence[Source], stages: Sequence[Stage], seed: int, blocks: Blocks
    ) -> None:
        for source in sources:
            if source.n_samples < 1:
                raise ConfigError(
                    f"data.sources.{source.name}: holds less than one sample of data.seq_len + 1 "
                    "tokens; use a shorter data.seq_len or more text"
                )
        self.sources = tuple(sources)
        self.stages = tuple(stages)
        self.seed = seed
        self._blocks = blocks
        self._mixture = Mixture([s.name for s in sources], stages)

    def locate(self, index: npt.ArrayLike) -> Location:
        """Where the samples of the global indices `index` [n] lie."""
        source, draw = self._mixture.draw(np.asarray(index, np.int64))
        n_samples = np.array([s.n_samples for s in self.sources], np.int64)[source]
        epoch, nth = np.divmod(draw, n_samples)
        position = np.empty_like(nth)
        for number, epoch_number in {*zip(source.tolist(), epoch.tolist(), strict=True)}:
            mine = (source == number) & (epoch == epoch_number)
            this = self.sources[number]
            key = _key(self.seed, this.name, epoch_number)
            position[mine] = epoch_order(nth[mine], this.n_samples, key, self._blocks)
        return Location(source, epoch, position)


def _key(seed: int, source: str, epoch: int) -> int:
    digest = hashlib.blake2b(f"{seed}\0{source}\0{epoch}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")
