"""Which keys a query sees, said once for all attention backends.

A mask is a rule over integer places, not a tensor: query i stands at `(q_start + i) // q_per`, key
j at `(k_start + j) // k_per`, and

    i sees j  iff  nearest <= place(i) - place(j) < window  and  both belong to the same document.

Causal attention, a sliding window, the look-back over a chunk's border, tokens that read the
summaries of earlier chunks, and packed documents are all of this form. Kernels (`attention`) ask
the rule what they can make use of, and make what they need of it once for all layers; `dense` is
the truth that tests hold them against.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

EVERY = -1
"""The document of a key that queries of all documents see."""

Kind = Literal["plain", "causal", "window", "documents", "memory"]


@dataclass(frozen=True)
class Mask:
    """See the module's text. q_docs: [B, q_len], k_docs: [B, k_len], any integers, or both None."""

    q_len: int
    k_len: int
    q_start: int = 0
    k_start: int = 0
    q_per: int = 1
    k_per: int = 1
    nearest: int = 0
    window: int | None = None
    q_docs: Tensor | None = None
    k_docs: Tensor | None = None

    @property
    def sees_all(self) -> bool:
        """Every query sees every key."""
        first, last = self._q_place(0), self._q_place(self.q_len - 1)
        oldest, newest = self._k_place(0), self._k_place(self.k_len - 1)
        inside = self.window is None or last - oldest < self.window
        return self.q_docs is None and inside and first - newest >= self.nearest

    @property
    def is_square(self) -> bool:
        """Queries and keys are the same tokens."""
        same = (self.q_len, self.q_start, self.q_per) == (self.k_len, self.k_start, self.k_per)
        return same and self.q_per == 1 and self.nearest == 0

    @property
    def is_triangle(self) -> bool:
        """The lower triangle, diagonal included, of as many keys as queries, and nothing else."""
        narrow = self.window is not None and self.window < self.q_len
        return self.is_square and not narrow and self.q_docs is None

    @property
    def kind(self) -> Kind:
        """What a kernel must be able to do.

        plain: all or the triangle; causal: queries that are the last of the keys; window, documents
        and memory: as they say, the later word where two hold.
        """
        if self.sees_all or self.is_triangle:
            return "plain"
        if self.nearest > 0:
            return "memory"
        if self.q_docs is not None:
            return "documents"
        return "causal" if self.window is None else "window"

    def places(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """The places of queries [q_len] and keys [k_len], int32."""
        q = torch.arange(self.q_start, self.q_start + self.q_len, dtype=torch.int32, device=device)
        k = torch.arange(self.k_start, self.k_start + self.k_len, dtype=torch.int32, device=device)
        q = q if self.q_per == 1 else q.div(self.q_per, rounding_mode="floor")
        return q, k if self.k_per == 1 else k.div(self.k_per, rounding_mode="floor")

    def dense(self, device: torch.device) -> Tensor:
        """[q_len, k_len], or [B, q_len, k_len] with documents; True where a key is seen."""
        q, k = self.places(device)
        visible = k <= q[:, None] - self.nearest
        if self.window is not None:
            visible &= k > q[:, None] - self.window
        if self.q_docs is None or self.k_docs is None:
            return visible
        same = self.q_docs[:, :, None] == self.k_docs[:, None, :]
        return visible & (same | (self.k_docs == EVERY)[:, None, :])

    def select(self, rows: Tensor) -> Mask:
        """For these rows of the batch."""
        return self._map(lambda documents: documents[rows])

    def to(self, device: torch.device) -> Mask:
        return self._map(lambda documents: documents.to(device))

    def _map(self, act: Callable[[Tensor], Tensor]) -> Mask:
        if self.q_docs is None or self.k_docs is None:
            return self
        return dataclasses.replace(self, q_docs=act(self.q_docs), k_docs=act(self.k_docs))

    def _q_place(self, i: int) -> int:
        return (self.q_start + i) // self.q_per

    def _k_place(self, j: int) -> int:
        return (self.k_start + j) // self.k_per


def causal(
    q_len: int,
    k_len: int | None = None,
    *,
    window: int | None = None,
    q_docs: Tensor | None = None,
    k_docs: Tensor | None = None,
) -> Mask:
    """The queries are the last of `k_len` tokens, and each sees those up to its own.

    window: at most so many, its own included. With as many keys as queries `q_docs` is for both.
    """
    k_len = q_len if k_len is None else k_len
    k_docs = q_docs if k_docs is None else k_docs
    return Mask(q_len, k_len, k_len - q_len, window=window, q_docs=q_docs, k_docs=k_docs)


def memory(
    n_tokens: int,
    chunk_len: int,
    n_chunks: int,
    n_summary: int,
    *,
    q_docs: Tensor | None = None,
    k_docs: Tensor | None = None,
) -> Mask:
    """Tokens of whole sequences see the summaries of earlier chunks, and a slot that all see.

    Key 0 is the slot, key 1 + j the summary number j, of chunk j // n_summary.
    """
    return Mask(
        q_len=n_tokens,
        k_len=1 + n_chunks * n_summary,
        k_start=-1,
        q_per=chunk_len,
        k_per=n_summary,
        nearest=1,
        q_docs=q_docs,
        k_docs=k_docs,
    )


def everything(
    q_len: int, k_len: int, *, q_docs: Tensor | None = None, k_docs: Tensor | None = None
) -> Mask:
    """All keys, of the same document where documents are given."""
    return Mask(q_len, k_len, q_start=k_len, q_docs=q_docs, k_docs=k_docs)
