from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modular_lm.model.layers import RMSNorm, apply_rope, make_rope


def test_rms_norm_is_its_formula() -> None:
    norm = RMSNorm(6, eps=1e-3).double()
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(2, 3, 6, dtype=torch.float64)
    expected = x / (x.pow(2).mean(-1, keepdim=True) + 1e-3).sqrt() * norm.weight
    torch.testing.assert_close(norm(x), expected, rtol=1e-12, atol=1e-12)


def test_rms_norm_of_bf16_is_computed_in_fp32() -> None:
    norm = RMSNorm(512, eps=1e-5)
    torch.nn.init.normal_(norm.weight)
    norm.bfloat16()
    x = torch.randn(4, 512, dtype=torch.bfloat16)
    wide = RMSNorm(512, eps=1e-5)
    wide.load_state_dict({"weight": norm.weight.float()})
    assert norm(x).dtype == torch.bfloat16
    assert torch.equal(norm(x), wide(x.float()).bfloat16())


def test_rope_turns_interleaved_pairs_as_complex_numbers() -> None:
    """Meta's formulation: neighbours are real and imaginary part, multiplied by e^(i t freq)."""
    x = torch.randn(5, 3, 8, dtype=torch.float64)
    rope = make_rope(torch.arange(5), 8, theta=10000.0, dtype=torch.float64)
    frequency = 10000.0 ** (-torch.arange(0, 8, 2, dtype=torch.float64) / 8)
    turn = torch.polar(torch.ones(5, 4).double(), torch.arange(5)[:, None] * frequency)
    pairs = torch.view_as_complex(x.view(5, 3, 4, 2)) * turn[:, None]
    expected = torch.view_as_real(pairs).flatten(-2)
    torch.testing.assert_close(apply_rope(x, rope), expected, rtol=1e-12, atol=1e-12)


@given(first=st.integers(0, 1000), second=st.integers(0, 1000), shift=st.integers(0, 1000))
@settings(deadline=None, max_examples=25)
def test_scores_depend_on_the_distance_only(first: int, second: int, shift: int) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, 1, 16, dtype=torch.float64, generator=generator)

    def score(here: int, there: int) -> torch.Tensor:
        turned = (
            apply_rope(x, make_rope(torch.tensor([at]), 16, 10000.0, torch.float64))
            for x, at in ((q, here), (k, there))
        )
        return torch.mul(*turned).sum()

    torch.testing.assert_close(
        score(first, second), score(first + shift, second + shift), rtol=1e-9, atol=1e-9
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_rope_keeps_the_type_and_is_at_least_fp32_inside(dtype: torch.dtype) -> None:
    rope = make_rope(torch.arange(4), 8, 10000.0, dtype)
    assert rope.cos.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert apply_rope(torch.ones(4, 1, 8, dtype=dtype), rope).dtype == dtype
