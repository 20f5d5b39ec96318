"""The attention backends: from queries, keys, values and a `Mask`, one `Backend` each.

A backend computes in two steps. `form` makes of a mask what its kernel takes, once for all layers
that share the mask; `attend` computes, from q: [B, s, n_heads, d], k and v: [B, n, n_kv_heads, d],
[B, s, n_heads, d], with a scale of d ** -0.5. All compute the same function. Which of them can run
where is `attention`'s business, which also chooses.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from modular_lm.model.masks import EVERY, Mask, causal


@dataclass(frozen=True)
class Backend:
    """form: (mask, number of rows B, device) -> its form; attend: (q, k, v, mask, form) -> y."""

    form: Callable[[Mask, int, torch.device], Any]
    attend: Callable[[Tensor, Tensor, Tensor, Mask, Any], Tensor]


# ------------------------------------------------------------------ SDPA


def _sdpa_form(mask: Mask, rows: int, device: torch.device) -> Any:
    """A mask in memory, [s, n] or [B, 1, s, n] with documents, where no shape says what is seen.

    For a window: the forms of its blocks, with their masks.
    """
    if _in_blocks(mask):
        return [(part, _sdpa_form(part, rows, device)) for part in _window_blocks(mask)]
    if mask.sees_all or mask.is_triangle or _is_lower_part(mask):
        return None
    visible = mask.dense(device)
    return visible[:, None] if visible.dim() == 3 else visible


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Mask, form: Any) -> Tensor:
    """PyTorch's own; without a mask in memory wherever all or a triangle is seen.

    Look-back is the lower part of a larger triangle. A window is cut into blocks of its own length,
    so that cost and memory stay linear in the number of tokens.
    """
    if _in_blocks(mask):
        return _windowed(q, k, v, mask, form)
    if _is_lower_part(mask):
        # Queries in front, whose results are dropped: cheaper than a kernel that takes a mask,
        # which does not skip what is hidden.
        q = F.pad(q, (0, 0, 0, 0, mask.q_start, 0))
        return _sdpa(q, k, v, causal(mask.k_len), None)[:, mask.q_start :]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    y = F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=form,
        is_causal=form is None and mask.is_triangle,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return y.transpose(1, 2)


def _is_lower_part(mask: Mask) -> bool:
    """Whether added queries, at most as many as there are, make it a triangle."""
    return mask.kind == "causal" and mask.q_start <= mask.q_len


def _in_blocks(mask: Mask) -> bool:
    return mask.window is not None and mask.is_square and mask.window < mask.q_len


def _window_blocks(mask: Mask) -> tuple[Mask, Mask]:
    """The masks of the first block of a window, and of the others, which see the one before."""
    assert mask.window is not None
    documents = mask.q_docs
    if documents is not None:
        documents = F.pad(documents, (0, -mask.q_len % mask.window))
        documents = documents.unflatten(1, (-1, mask.window))
    return border_masks(mask.window, mask.window, documents, mask.window)


def _windowed(q: Tensor, k: Tensor, v: Tensor, mask: Mask, form: Any) -> Tensor:
    """A window of W over [B, T, ...]: blocks of W tokens that look back by one block."""
    assert mask.window is not None
    # Padding stands behind all tokens: no real query sees it.
    pad = (0, 0, 0, 0, 0, -mask.q_len % mask.window)
    q, k, v = (F.pad(x, pad).unflatten(1, (-1, mask.window)) for x in (q, k, v))
    first, others = (functools.partial(_sdpa, mask=part, form=its) for part, its in form)
    y = with_border(q, k, v, (k[:, :-1], v[:, :-1]), first, others)
    return y.flatten(1, 2)[:, : mask.q_len]


# ------------------------------------------------------------------ chunks that look back

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def with_border(
    q: Tensor, k: Tensor, v: Tensor, border: tuple[Tensor, Tensor], first: Attend, others: Attend
) -> Tensor:
    """Attention within chunks, all but the first of which also see keys from before their border.

    q, k, v: [B, K, S, heads, d]; border: keys and values [B, K - 1, r, heads, d] that come before
    those of the chunks 1..K-1; first: attends within the first chunks, others: within the others,
    by the masks of `border_masks`. Returns [B, K, S, heads, d].
    """
    y = first(q[:, 0], k[:, 0], v[:, 0])
    keys, values = (
        torch.cat((before, own[:, 1:]), dim=2).flatten(0, 1)
        for before, own in zip(border, (k, v), strict=True)
    )
    of_others = others(q[:, 1:].flatten(0, 1), keys, values)
    return torch.cat((y[:, None], of_others.unflatten(0, (q.shape[0], -1))), dim=1)


def border_masks(
    length: int, lookback: int, documents: Tensor | None, window: int | None = None
) -> tuple[Mask, Mask]:
    """What first chunks see, [S, S], and all others, [S, r + S]; documents: [B, K, S]."""
    if documents is None:
        return causal(length), causal(length, lookback + length, window=window)
    own = documents[:, 1:].flatten(0, 1)
    keys = torch.cat((documents[:, :-1, length - lookback :], documents[:, 1:]), dim=2)
    others = causal(length, lookback + length, window=window, q_docs=own, k_docs=keys.flatten(0, 1))
    return causal(length, q_docs=documents[:, 0]), others


# ------------------------------------------------------------------ flex_attention


def _flex_form(mask: Mask, rows: int, device: torch.device) -> Any:
    """Its `BlockMask`, None where all is seen."""
    from torch.nn.attention.flex_attention import create_block_mask

    if mask.sees_all:
        return None
    batch = None if mask.q_docs is None else mask.q_docs.shape[0]
    # Compiled, it does not hold the mask of all pairs in memory.
    create: Any = _compiled(create_block_mask) if device.type == "cuda" else create_block_mask
    return create(_rule(mask, device), batch, None, mask.q_len, mask.k_len, device=device)


def _flex(q: Tensor, k: Tensor, v: Tensor, mask: Mask, form: Any) -> Tensor:
    """PyTorch's flex_attention, which skips blocks of keys that nobody sees; compiled on a GPU."""
    from torch.nn.attention.flex_attention import flex_attention

    attention: Any = _compiled(flex_attention) if q.is_cuda else flex_attention
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    y = attention(q, k, v, block_mask=form, enable_gqa=q.shape[1] != k.shape[1])
    return y.transpose(1, 2)


def _rule(mask: Mask, device: torch.device) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    q_place, k_place = mask.places(device)
    q_docs, k_docs = mask.q_docs, mask.k_docs

    def sees(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        distance = q_place[i] - k_place[j]
        visible = distance >= mask.nearest
        if mask.window is not None:
            visible = visible & (distance < mask.window)
        if q_docs is not None and k_docs is not None:
            visible = visible & ((q_docs[b, i] == k_docs[b, j]) | (k_docs[b, j] == EVERY))
        return visible

    return sees


@functools.cache
def _compiled(function: Any) -> Any:
    """Shapes stay open: past a few recompilations torch falls back to a kernel that holds all
    scores in memory."""
    return torch.compile(function)


# ------------------------------------------------------------------ xformers


def block_diagonal(mask: Mask, rows: int, device: torch.device) -> Any:
    """xformers' bias over rows packed into one: one block per row and document.

    A document must be a run of neighbouring tokens, its queries the last of its keys. Not for
    `memory` masks. Reads the documents on the CPU.
    """
    from xformers.ops.fmha.attn_bias import (
        BlockDiagonalCausalFromBottomRightMask,
        BlockDiagonalCausalLocalAttentionFromBottomRightMask,
        BlockDiagonalMask,
    )

    q_lens, k_lens = _block_lengths(mask, rows)
    if mask.q_start >= mask.k_len:
        return BlockDiagonalMask.from_seqlens(q_lens, k_lens, device=device)
    triangles = BlockDiagonalCausalFromBottomRightMask.from_seqlens(q_lens, k_lens, device=device)
    if mask.window is None:
        return triangles
    return BlockDiagonalCausalLocalAttentionFromBottomRightMask(
        q_seqinfo=triangles.q_seqinfo,
        k_seqinfo=triangles.k_seqinfo,
        _batch_sizes=triangles._batch_sizes,
        _window_size=mask.window,
    )


def _block_lengths(mask: Mask, rows: int) -> tuple[list[int], list[int]]:
    """The number of queries and of keys of each block, in order."""
    if mask.q_docs is None or mask.k_docs is None:
        return [mask.q_len] * rows, [mask.k_len] * rows
    q_lens, k_lens = [], []
    for q_row, k_row in zip(mask.q_docs.tolist(), mask.k_docs.tolist(), strict=True):
        # Documents in the order in which they appear.
        for document in dict.fromkeys(k_row):
            q_lens.append(q_row.count(document))
            k_lens.append(k_row.count(document))
    return q_lens, k_lens


def _xformers(q: Tensor, k: Tensor, v: Tensor, mask: Mask, form: Any) -> Tensor:
    """xformers' memory-efficient attention over blocks of documents."""
    from xformers.ops import memory_efficient_attention

    groups = q.shape[2] // k.shape[2]
    query, keys, values = (x.flatten(0, 1).unsqueeze(0) for x in (q, k, v))
    if groups > 1:
        keys, values = (x.repeat_interleave(groups, dim=2) for x in (keys, values))
    return memory_efficient_attention(query, keys, values, attn_bias=form).view_as(q)


BACKENDS: dict[str, Backend] = {
    "sdpa": Backend(_sdpa_form, _sdpa),
    "flex": Backend(_flex_form, _flex),
    "xformers": Backend(block_diagonal, _xformers),
}
