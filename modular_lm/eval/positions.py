"""Loss by position: where in a chunk, and in which chunk of a document, tokens are hard.

Chunking costs most at the first positions of a chunk, whose tokens see little before them;
one mean over all tokens hides that. Here sums per position are collected and folded into chunks of
any length, also for models without chunks that are compared with one. Which model scores which
documents is in `perplexity`, how the curves are drawn in `tracking.figures`.

A position is that of the input token: at position 0 of a chunk the model has read one token of that
chunk and predicts the second. The first chunk of a document has nothing before it in any model, so
the cost of chunking shows in the later ones.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from modular_lm.files import full_disk_named, write_text_atomic


@dataclass(frozen=True)
class LossSums:
    """Summed nll in nats [N] and number of scored tokens [N], by some index; both fp64."""

    nll: Tensor
    count: Tensor

    @staticmethod
    def zeros(n: int) -> LossSums:
        """Nothing scored yet at any of `n` indices."""
        return LossSums(torch.zeros(n, dtype=torch.float64), torch.zeros(n, dtype=torch.float64))

    def accumulate(self, losses: Tensor, scored: Tensor) -> None:
        """Add rows of losses [n, t] by position, t <= N, where `scored` [n, t] (bool) is true."""
        width, scored = losses.shape[1], scored.cpu()
        self.nll[:width] += losses.double().cpu().where(scored, 0.0).sum(0)
        self.count[:width] += scored.sum(0)

    def __add__(self, other: LossSums) -> LossSums:
        return LossSums(self.nll + other.nll, self.count + other.count)

    def mean(self, start: int = 0, stop: int | None = None) -> float | None:
        """Mean nll per token, in nats, of the indices [start, stop); None without tokens."""
        count = self.count[start:stop].sum().item()
        return self.nll[start:stop].sum().item() / count if count else None

    def describe(self) -> dict[str, list[Any]]:
        """`nll`: the mean at each index, None if not a finite number; `count`: tokens there."""
        means = (self.nll / self.count).tolist()
        return {
            "nll": [mean if math.isfinite(mean) else None for mean in means],
            "count": self.count.long().tolist(),
        }


@dataclass(frozen=True)
class ChunkCurves:
    """The losses of documents cut into chunks of S tokens, K chunks at most.

    position_in_chunk: [S], over all chunks, which are the first one of each document
    (position_in_first_chunk) and the others (position_in_later_chunks); chunk_index: [K].
    """

    position_in_chunk: LossSums
    position_in_first_chunk: LossSums
    position_in_later_chunks: LossSums
    chunk_index: LossSums

    def metrics(self) -> dict[str, float]:
        """Three figures to compare runs by, nats per token, of all chunks after the first.

        nll_later_chunks: all their tokens; nll_chunk_start: their position 0; nll_chunk_end: the
        last quarter of their positions. Start less end is what a chunk's beginning costs. Those
        for which there are no tokens are left out.
        """
        later = self.position_in_later_chunks
        chunk_len = len(later.nll)
        found = {
            "nll_later_chunks": later.mean(),
            "nll_chunk_start": later.mean(0, 1),
            "nll_chunk_end": later.mean(chunk_len - max(1, chunk_len // 4)),
        }
        return {name: value for name, value in found.items() if value is not None}


def fold(sums: LossSums, chunk_len: int) -> ChunkCurves:
    """Sums by position in the document [T] -> curves of chunks of `chunk_len` tokens."""
    nll, count = _in_chunks(sums.nll, chunk_len), _in_chunks(sums.count, chunk_len)
    first, later = LossSums(nll[0], count[0]), LossSums(nll[1:].sum(0), count[1:].sum(0))
    return ChunkCurves(
        position_in_chunk=first + later,
        position_in_first_chunk=first,
        position_in_later_chunks=later,
        chunk_index=LossSums(nll.sum(1), count.sum(1)),
    )


def _in_chunks(values: Tensor, chunk_len: int) -> Tensor:
    """[T] -> [K, S], filled up with zeros."""
    return F.pad(values, (0, -len(values) % chunk_len)).view(-1, chunk_len)


def write_curves(path: Path, step: int, curves: Mapping[str, ChunkCurves]) -> None:
    """Write the curves of all sources as JSON, in place of what an earlier attempt left.

    `{"step", "unit", "chunk_len", "sources": {source: {curve: {"nll": [...], "count": [...]}}}}`
    with the curves of `ChunkCurves`; `nll` is null where no token was scored, or where it is not
    finite. Without curves no file is left. Raises RunFailedError on a full disk.
    """
    if not curves:
        path.unlink(missing_ok=True)
        return
    sources = {
        name: {curve: sums.describe() for curve, sums in vars(found).items()}
        for name, found in curves.items()
    }
    chunk_len = len(next(iter(curves.values())).position_in_chunk.nll)
    report = {"step": step, "unit": "nats per token", "chunk_len": chunk_len, "sources": sources}
    with full_disk_named(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_text_atomic(path, json.dumps(report, allow_nan=False) + "\n")
