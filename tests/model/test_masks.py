from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings

from modular_lm.model.masks import EVERY, Mask, causal, everything, memory

from .mask_strategy import masks


def documents_of(lengths: list[int]) -> torch.Tensor:
    return torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))


def by_hand(mask: Mask) -> torch.Tensor:
    """[B, q, k], pair by pair."""
    docs = mask.q_docs is not None
    visible = torch.zeros(2 if docs else 1, mask.q_len, mask.k_len, dtype=torch.bool)
    for b in range(len(visible)):
        for i in range(mask.q_len):
            for j in range(mask.k_len):
                distance = (mask.q_start + i) // mask.q_per - (mask.k_start + j) // mask.k_per
                sees = distance >= mask.nearest
                sees &= mask.window is None or distance < mask.window
                if mask.q_docs is not None and mask.k_docs is not None:
                    sees &= mask.k_docs[b, j].item() in (EVERY, mask.q_docs[b, i].item())
                visible[b, i, j] = sees
    return visible


@given(mask=masks())
@settings(deadline=None, max_examples=100)
def test_dense_is_the_rule_pair_by_pair(mask: Mask) -> None:
    dense = mask.dense(torch.device("cpu"))
    assert torch.equal(dense.expand(by_hand(mask).shape), by_hand(mask))


@given(mask=masks())
@settings(deadline=None, max_examples=100)
def test_what_a_mask_says_of_itself_is_true(mask: Mask) -> None:
    dense = mask.dense(torch.device("cpu"))
    if mask.sees_all:
        assert dense.all()
    if mask.is_triangle:
        triangle = torch.ones(mask.q_len, mask.q_len, dtype=torch.bool).tril()
        assert torch.equal(dense, triangle)
    if mask.q_docs is None and dense.all():
        assert mask.sees_all


def test_causal_look_back_and_memory_by_picture() -> None:
    cpu = torch.device("cpu")
    assert causal(2, 5).dense(cpu).int().tolist() == [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]
    assert causal(3, window=2).dense(cpu).int().tolist() == [[1, 0, 0], [1, 1, 0], [0, 1, 1]]
    # Two chunks of two tokens, two summaries each, behind the slot that all see.
    seen = [[1, 0, 0, 0, 0]] * 2 + [[1, 1, 1, 0, 0]] * 2
    assert memory(4, 2, 2, 2).dense(cpu).int().tolist() == seen
    packed = causal(4, q_docs=documents_of([1, 3])[None])
    assert packed.dense(cpu)[0].int().tolist() == [
        [1, 0, 0, 0],
        [0, 1, 0, 0],
        [0, 1, 1, 0],
        [0, 1, 1, 1],
    ]


@pytest.mark.parametrize(
    ("mask", "kind"),
    [
        (causal(8), "plain"),
        (causal(1, 8), "plain"),
        (everything(3, 8), "plain"),
        (causal(8, window=8), "plain"),
        (causal(8, window=7), "window"),
        (causal(4, 8), "causal"),
        (causal(4, q_docs=documents_of([1, 3])[None]), "documents"),
        (memory(8, 4, 2, 1), "memory"),
    ],
)
def test_kinds(mask: Mask, kind: str) -> None:
    assert mask.kind == kind
