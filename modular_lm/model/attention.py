"""Attention as a function of queries, keys and values, through PyTorch's SDPA.

Knows no parameters: `mixers.attention` and the memory attention of `aggregation` call it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Each query attends to the keys up to its own; the queries are the last of the positions.

    q: [B, s, n_heads, d]; k, v: [B, n, n_kv_heads, d] with n >= s; returns [B, s, n_heads, d].
    """
    s, n = q.shape[1], k.shape[1]
    if s == n:  # no mask is built: training stays linear in memory
        return _sdpa(q, k, v, is_causal=True)
    if s == 1:
        return _sdpa(q, k, v)
    visible = torch.ones(s, n, dtype=torch.bool, device=q.device).tril(n - s)
    return _sdpa(q, k, v, visible)


def masked_attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None) -> Tensor:
    """Queries attend to the keys that `visible` ([s, n], bool) allows; None: to all.

    q: [B, s, n_heads, d]; k, v: [B, n, n_heads, d]; returns [B, s, n_heads, d].
    """
    return _sdpa(q, k, v, visible)


def _sdpa(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None = None, is_causal: bool = False
) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    y = F.scaled_dot_product_attention(
        q, k, v, attn_mask=visible, is_causal=is_causal, enable_gqa=q.shape[1] != k.shape[1]
    )
    return y.transpose(1, 2)
