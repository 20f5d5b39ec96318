"""How the tokens of a chunk become summaries, and how summaries add up along a sequence.

Plain functions without parameters, for the modes of `aggregation`. A sub-chunk is one of the `m`
equal parts of a chunk; each gives one summary. With documents, a summary belongs to the document of
the last token of its sub-chunk and is made of that document's tokens only.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from modular_lm.config.schema import Pool
from modular_lm.model.layers import precise


def pool_chunks(h: Tensor, n_summary: int, pool: Pool, documents: Tensor | None = None) -> Tensor:
    """One vector per sub-chunk, its mean or its last token; [B, K, S, D] -> [B, K, m, D].

    documents: [B, K, S]. In the precision of sums (`precise`), as what follows adds many of them.
    """
    parts = h.unflatten(2, (n_summary, -1))
    wide = precise(h.dtype)
    if pool == "last":
        return parts[:, :, :, -1].to(wide)
    if documents is None:
        return parts.mean(3, dtype=wide)
    of_token = documents.unflatten(2, (n_summary, -1))[..., None]
    mine = of_token == of_token[:, :, :, -1:]
    return torch.where(mine, parts, 0).sum(3, dtype=wide) / mine.sum(3)


def summary_documents(documents: Tensor, n_summary: int) -> Tensor:
    """The document of each summary; [B, K, S] -> [B, K, m]."""
    return documents.unflatten(2, (n_summary, -1))[..., -1]


def running_sums(summaries: Tensor, documents: Tensor) -> tuple[Tensor, Tensor]:
    """The sum of each summary and all before it of its document, and how many these are.

    summaries: [B, n, D], documents: [B, n], growing along a row; returns [B, n, D] and [B, n, 1].
    In log2(n) steps (Hillis and Steele, CACM 29(12), 1986), each of which doubles the reach and
    stops at borders: a difference of prefixes would leak the other documents by rounding.
    """
    numbers = torch.ones_like(summaries[..., :1])
    reach = 1
    while reach < summaries.shape[1]:
        same = (documents[:, reach:] == documents[:, :-reach])[..., None]
        summaries, numbers = (
            torch.cat((x[:, :reach], x[:, reach:] + torch.where(same, x[:, :-reach], 0)), dim=1)
            for x in (summaries, numbers)
        )
        reach *= 2
    return summaries, numbers


def pool_piece(pooled: Tensor, h: Tensor, starts: Sequence[int], length: int, pool: Pool) -> Tensor:
    """`pool_chunks` for chunks that arrive in pieces.

    pooled: [B, m, D], zeros before the first piece of a chunk; h: [B, s, D], for each row the
    tokens from `starts[b]` on of a chunk of `length`; returns the new `pooled`, final once the
    whole chunk went in.
    """
    part = length // pooled.shape[1]
    place = torch.tensor(starts, device=h.device)[:, None] + torch.arange(
        h.shape[1], device=h.device
    )
    of_part = torch.arange(pooled.shape[1], device=h.device)
    belongs = place.div(part, rounding_mode="floor")[:, None, :] == of_part[:, None]  # [B, m, s]
    if pool == "last":
        weights = (belongs & (place % part == part - 1)[:, None, :]).to(pooled.dtype)
    else:
        weights = belongs.to(pooled.dtype) / part
    return pooled + weights @ h.to(pooled.dtype)
