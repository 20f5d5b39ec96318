"""The global norm against the norm of all gradients as one vector."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from modular_lm.optim import local_squares, scale_gradients

CPU = torch.device("cpu")


def parameters() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    found = [nn.Parameter(torch.zeros(shape)) for shape in ((3, 4), (5,), (2, 2, 2), (0, 3))]
    for p in found:
        p.grad = torch.randn(p.shape, generator=generator)
    return [*found, nn.Parameter(torch.zeros(7))]  # the last one has no gradient


def whole(found: list[nn.Parameter]) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in found if p.grad is not None]).double()


def test_norm_and_scaling() -> None:
    found = parameters()
    before = whole(found)
    norm = local_squares(found, CPU).sqrt()
    assert norm.item() == pytest.approx(before.norm().item(), rel=1e-6)
    scale_gradients(found, norm, 0.5)
    torch.testing.assert_close(whole(found), before * 0.5 / before.norm(), rtol=1e-5, atol=0)
    # What is within the limit stays, to the bit.
    kept = whole(found)
    scale_gradients(found, local_squares(found, CPU).sqrt(), 0.6)
    assert torch.equal(whole(found), kept)


def test_no_gradients_make_a_norm_of_zero() -> None:
    assert local_squares([nn.Parameter(torch.zeros(2))], CPU).item() == 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_gradient_that_is_not_finite_shows_in_the_norm(bad: float) -> None:
    found = parameters()
    assert found[1].grad is not None
    found[1].grad[3] = bad
    assert not local_squares(found, CPU).isfinite()
