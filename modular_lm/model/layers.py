"""The small parts: RMSNorm, rotary embedding, SwiGLU feed-forward, and how a weight starts.

Everything works in the type of its input; what needs precision (norms, rotations, sums) is
computed in at least fp32, and in fp64 where the input is fp64.

A module with parameters says how they start in `initial_weights()`, a dict from the names of its
own parameters (and of plain `nn.Linear` children) to `Initial`; `init` draws them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modular_lm.config.schema import ModelConfig
from modular_lm.model.sizes import sizes_of


@dataclass(frozen=True)
class Initial:
    """A normal distribution cut at three standard deviations; with std 0, the constant `mean`."""

    mean: float = 0.0
    std: float = 0.0


ONES = Initial(mean=1.0)
ZEROS = Initial(mean=0.0)


def normal(config: ModelConfig, fan_in: int) -> Initial:
    """Of std `fan_in ** -0.5`, or `init_base_std` where the config sets it (Lingua's rule)."""
    return Initial(std=config.init_base_std or fan_in**-0.5)


def linear(d_in: int, d_out: int) -> nn.Linear:
    """A matrix without bias, as all of Llama's."""
    return nn.Linear(d_in, d_out, bias=False)


def precise(dtype: torch.dtype) -> torch.dtype:
    """The type to accumulate in: fp32, or fp64 for fp64."""
    return torch.promote_types(dtype, torch.float32)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) * weight over the last dimension (arXiv:1910.07467).

    PyTorch computes it in fp32 where x is bf16 and rounds the result.
    """

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def initial_weights(self) -> dict[str, Initial]:
        return {"weight": ONES}

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


class Rope:
    """Cosines and sines by which heads at given positions are turned; cos, sin: [..., d / 2].

    Neither a dataclass nor a tuple: into those FSDP reaches to cast a layer's inputs to bf16.
    """

    def __init__(self, cos: Tensor, sin: Tensor) -> None:
        self.cos = cos
        self.sin = sin


def make_rope(positions: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> Rope:
    """The rotations at `positions` ([...], any integer type), in the precision of `dtype`."""
    powers = torch.arange(0, head_dim, 2, dtype=torch.float64, device=positions.device) / head_dim
    angles = positions.to(torch.float64)[..., None] * theta**-powers
    wide = precise(dtype)
    return Rope(angles.cos().to(wide), angles.sin().to(wide))


def apply_rope(x: Tensor, rope: Rope) -> Tensor:
    """Turn neighbouring pairs of each head (RoPE, arXiv:2104.09864, in Meta's interleaved order).

    x: [..., n_heads, d]; the leading dimensions of `rope` broadcast to those of x.
    """
    cos, sin = rope.cos.unsqueeze(-2), rope.sin.unsqueeze(-2)
    even, odd = x.to(cos.dtype).unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
    return turned.flatten(-2).to(x.dtype)


class FeedForward(nn.Module):
    """SwiGLU (arXiv:2002.05202): w2(silu(w1 x) * w3 x)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        dim, hidden = config.dim, sizes_of(config).ffn_dim
        self.w1 = linear(dim, hidden)
        self.w3 = linear(dim, hidden)
        self.w2 = linear(hidden, dim)

    def initial_weights(self) -> dict[str, Initial]:
        into, out = self.w1.in_features, self.w2.in_features
        return {
            "w1.weight": normal(self.config, into),
            "w3.weight": normal(self.config, into),
            "w2.weight": normal(self.config, out),
        }

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))
