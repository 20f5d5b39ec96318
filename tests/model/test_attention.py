from __future__ import annotations

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modular_lm.model.attention import causal_attention, masked_attention


def by_hand(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, visible: torch.Tensor
) -> torch.Tensor:
    """softmax(q k / sqrt(d)) v with explicit scores; each key head serves a run of query heads."""
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], dim=2) for x in (k, v))
    scores = torch.einsum("bshd,bnhd->bhsn", q, k) / math.sqrt(q.shape[-1])
    weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
    return torch.einsum("bhsn,bnhd->bshd", weights, v)


def random_qkv(s: int, n: int, kv_heads: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(s * 100 + n)
    return tuple(
        torch.randn(2, length, heads, 8, dtype=torch.float64, generator=generator)
        for length, heads in ((s, 4), (n, kv_heads), (n, kv_heads))
    )


@given(s=st.integers(1, 9), cached=st.integers(0, 9), kv_heads=st.sampled_from([1, 2, 4]))
@settings(deadline=None, max_examples=40)
def test_queries_are_the_last_positions_and_see_no_later_key(
    s: int, cached: int, kv_heads: int
) -> None:
    q, k, v = random_qkv(s, cached + s, kv_heads)
    visible = torch.arange(cached + s) <= torch.arange(cached, cached + s)[:, None]
    expected = by_hand(q, k, v, visible)
    torch.testing.assert_close(causal_attention(q, k, v), expected, rtol=1e-12, atol=1e-12)


def test_masked_attention_follows_its_mask() -> None:
    q, k, v = random_qkv(5, 7, 4)
    visible = torch.rand(5, 7, generator=torch.Generator().manual_seed(1)) < 0.5
    visible[:, 0] = True
    torch.testing.assert_close(
        masked_attention(q, k, v, visible), by_hand(q, k, v, visible), rtol=1e-12, atol=1e-12
    )
    everything = torch.ones(5, 7, dtype=torch.bool)
    torch.testing.assert_close(
        masked_attention(q, k, v, None), by_hand(q, k, v, everything), rtol=1e-12, atol=1e-12
    )
