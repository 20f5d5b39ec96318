"""The attention backends: one function each, from queries, keys, values and a `Mask`.

All take q: [B, s, n_heads, d], k and v: [B, n, n_kv_heads, d] and return [B, s, n_heads, d]; they
scale by d ** -0.5 and compute the same function. Which of them can run where is `attention`'s
business, which also chooses.
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from modular_lm.model.masks import Mask, causal

Kernel = Callable[[Tensor, Tensor, Tensor, Mask], Tensor]


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
    """PyTorch's own; without a mask in memory wherever all or the triangle is seen.

    Look-back is the lower part of a larger triangle. A window is cut into blocks of its own length,
    so that cost and memory stay linear in the number of tokens. Other masks are built: [s, n], or
    [B, s, n] with documents.
    """
    if mask.window is not None and mask.is_square and mask.window < mask.q_len:
        return _windowed(q, k, v, mask)
    if mask.kind == "causal" and mask.q_start <= mask.q_len:
        # Queries in front, whose results are dropped: cheaper than a kernel that takes a mask,
        # which does not skip what is hidden.
        q = F.pad(q, (0, 0, 0, 0, mask.q_start, 0))
        return sdpa(q, k, v, causal(mask.k_len))[:, mask.q_start :]
    visible = None
    if not (mask.sees_all or mask.is_triangle):
        visible = mask.dense(q.device)
        visible = visible[:, None] if visible.dim() == 3 else visible
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    # The order of the two matters: a triangle of one token is also all of it.
    y = F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=visible,
        is_causal=visible is None and mask.is_triangle,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return y.transpose(1, 2)


def flex(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
    """PyTorch's flex_attention, which skips blocks of keys that nobody sees; compiled on a GPU."""
    from torch.nn.attention.flex_attention import flex_attention

    attention: Any = _compiled_flex() if q.is_cuda else flex_attention
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    blocks: Any = block_mask(mask, q.device)  # pyright: ignore[reportCallIssue]
    y = attention(q, k, v, block_mask=blocks, enable_gqa=q.shape[1] != k.shape[1])
    return y.transpose(1, 2)


def xformers(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
    """xformers' memory-efficient attention over blocks of documents."""
    from xformers.ops import memory_efficient_attention

    groups = q.shape[2] // k.shape[2]
    # Rows are packed into one: the blocks of the bias keep them apart.
    query = q.flatten(0, 1).unsqueeze(0)
    keys, values = (x.flatten(0, 1).unsqueeze(0) for x in (k, v))
    if groups > 1:
        keys, values = (x.repeat_interleave(groups, dim=2) for x in (keys, values))
    bias = block_diagonal(mask, q.shape[0])
    return memory_efficient_attention(query, keys, values, attn_bias=bias).view_as(q)


BACKENDS: dict[str, Kernel] = {"sdpa": sdpa, "flex": flex, "xformers": xformers}


# ------------------------------------------------------------------ chunks that look back


def with_border(
    q: Tensor, k: Tensor, v: Tensor, border: tuple[Tensor, Tensor], masks: tuple[Mask, Mask],
    kernel: Kernel,
) -> Tensor:  # fmt: skip
    """Attention within chunks, all but the first of which also see keys from before their border.

    q, k, v: [B, K, S, heads, d]; border: keys and values [B, K - 1, r, heads, d] that come before
    those of the chunks 1..K-1; masks: for the first chunks [S, S], for the others [S, r + S].
    Returns [B, K, S, heads, d].
    """
    first = kernel(q[:, 0], k[:, 0], v[:, 0], masks[0])
    keys, values = (
        torch.cat((before, own[:, 1:]), dim=2).flatten(0, 1)
        for before, own in zip(border, (k, v), strict=True)
    )
    others = kernel(q[:, 1:].flatten(0, 1), keys, values, masks[1])
    return torch.cat((first[:, None], others.unflatten(0, (q.shape[0], -1))), dim=1)


def border_masks(
    length: int, lookback: int, documents: Tensor | None, window: int | None = None
) -> tuple[Mask, Mask]:
    """The masks of `with_border`; documents: [B, K, S]."""
    if documents is None:
        return causal(length), causal(length, lookback + length, window=window)
    own = documents[:, 1:].flatten(0, 1)
    keys = torch.cat((documents[:, :-1, length - lookback :], documents[:, 1:]), dim=2)
    others = causal(length, lookback + length, window=window, q_docs=own, k_docs=keys.flatten(0, 1))
    return causal(length, q_docs=documents[:, 0]), others


def _windowed(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
    """A window of W over [B, T, ...]: blocks of W tokens that look back by one block."""
    assert mask.window is not None
    window, total = mask.window, mask.q_len
    missing = -total % window
    # Behind all tokens: no real query sees a padded key.
    q, k, v = (F.pad(x, (0, 0, 0, 0, 0, missing)).unflatten(1, (-1, window)) for x in (q, k, v))
    documents = mask.q_docs
    if documents is not None:
        documents = F.pad(documents, (0, missing)).unflatten(1, (-1, window))
    masks = border_masks(window, window, documents, window)
    return with_border(q, k, v, (k[:, :-1], v[:, :-1]), masks, sdpa).flatten(1, 2)[:, :total]


# ------------------------------------------------------------------ the mask for each backend

_MAX_BLOCK_MASKS = 16
_block_masks: OrderedDict[Any, Any] = OrderedDict()


@torch.compiler.disable  # made once, outside of any graph
def block_mask(mask: Mask, device: torch.device) -> Any:
    """flex_attention's `BlockMask`, None where all is seen; kept, for all layers ask the same."""
    from torch.nn.attention.flex_attention import create_block_mask

    if mask.sees_all:
        return None
    key = (mask.without_documents(), id(mask.q_docs), id(mask.k_docs), device)
    if key not in _block_masks:
        batch = None if mask.q_docs is None else mask.q_docs.shape[0]
        # Else a mask made while generating could not be used in training.
        with torch.inference_mode(False):
            made = create_block_mask(
                _rule(mask, device), batch, None, mask.q_len, mask.k_len, device=device
            )
        if len(_block_masks) >= _MAX_BLOCK_MASKS:
            _block_masks.popitem(last=False)
        # Holding the mask holds its documents: their ids stay theirs.
        _block_masks[key] = (made, mask)
    return _block_masks[key][0]


def _rule(mask: Mask, device: torch.device) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    q_place, k_place = mask.places(device)
    q_docs, k_docs = mask.q_docs, mask.k_docs

    def sees(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        distance = q_place[i] - k_place[j]
        visible = distance >= mask.nearest
        if mask.window is not None:
            visible = visible & (distance < mask.window)
        if q_docs is not None and k_docs is not None:
            visible = visible & ((q_docs[b, i] == k_docs[b, j]) | (k_docs[b, j] < 0))
        return visible

    return sees


@functools.cache
def _compiled_flex() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def block_diagonal(mask: Mask, n_rows: int) -> Any:
    """xformers' bias over the packed rows: one block per row and document.

    A document must be a run of neighbouring tokens, its queries the last of its keys. Not for
    `memory` masks. Reads the documents on the CPU.
    """
    from xformers.ops.fmha.attn_bias import (
        BlockDiagonalCausalFromBottomRightMask,
        BlockDiagonalCausalLocalAttentionFromBottomRightMask,
        BlockDiagonalMask,
    )

    q_lens, k_lens = _block_lengths(mask, n_rows)
    if mask.sees_all or (mask.nearest == 0 and mask.q_start >= mask.k_len):
        return BlockDiagonalMask.from_seqlens(q_lens, k_lens)
    triangles = BlockDiagonalCausalFromBottomRightMask.from_seqlens(q_lens, k_lens)
    if mask.window is None:
        return triangles
    return BlockDiagonalCausalLocalAttentionFromBottomRightMask(
        q_seqinfo=triangles.q_seqinfo,
        k_seqinfo=triangles.k_seqinfo,
        _batch_sizes=triangles._batch_sizes,
        _window_size=mask.window,
    )


def _block_lengths(mask: Mask, n_rows: int) -> tuple[list[int], list[int]]:
    """The number of queries and of keys of each block, in order."""
    if mask.q_docs is None or mask.k_docs is None:
        return [mask.q_len] * n_rows, [mask.k_len] * n_rows
    q_lens, k_lens = [], []
    for q_row, k_row in zip(mask.q_docs.tolist(), mask.k_docs.tolist(), strict=True):
        # Documents in the order in which they appear.
        for document in dict.fromkeys(k_row):
            q_lens.append(q_row.count(document))
            k_lens.append(k_row.count(document))
    return q_lens, k_lens
