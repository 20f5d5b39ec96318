"""Muon against torch.optim.Muon, and what orthogonalising does to singular values."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from modular_lm.optim.muon import Muon, newton_schulz

SHAPES = [(8, 16), (16, 8), (32, 32), (1, 8), (8, 16)]


@pytest.mark.parametrize(("momentum", "steps"), [(0.95, 5), (0.0, 3)])
def test_equals_torchs_muon_to_the_bit(momentum: float, steps: int) -> None:
    generator = torch.Generator().manual_seed(0)
    ours = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    settings = {"lr": 0.02, "weight_decay": 0.1, "momentum": momentum, "ns_steps": steps}
    muon = Muon([{"params": ours, **settings}])
    golden = torch.optim.Muon(theirs, **settings, adjust_lr_fn="match_rms_adamw")
    for _ in range(5):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn(p.shape, generator=generator)
            q.grad = p.grad.clone()
        muon.step()
        golden.step()
    assert all(torch.equal(p, q) for p, q in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("shape", [(48, 96), (96, 48), (64, 64)])
def test_singular_values_come_near_one_and_singular_vectors_stay(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(1)
    # Of a known decomposition, its singular values between 0.1 and 1.
    u, _, vt = torch.linalg.svd(torch.randn(shape, generator=generator), full_matrices=False)
    values = torch.linspace(0.1, 1, min(shape))
    found = newton_schulz(u @ values.diag() @ vt, 5).float()
    core = u.T @ found @ vt.T
    assert core.diagonal().min() > 0.6
    assert core.diagonal().max() < 1.3
    assert (core - core.diagonal().diag()).abs().max() < 0.1


def test_a_zero_gradient_moves_nothing() -> None:
    p = nn.Parameter(torch.ones(4, 4))
    p.grad = torch.zeros(4, 4)
    Muon([{"params": [p], "lr": 1.0, "weight_decay": 0.0}]).step()
    assert torch.equal(p, torch.ones(4, 4))
