"""One layer: a sequence mixer and a feed-forward, each behind a norm and beside a residual."""

from __future__ import annotations

from torch import Tensor, nn

from modular_lm.config.schema import ModelConfig
from modular_lm.model.layers import FeedForward, RMSNorm
from modular_lm.model.mixers import MIXERS, MixerState, Segments


class Block(nn.Module):
    """x + mixer(norm(x)), then x + ffn(norm(x)); parameters are named as in Meta's checkpoints."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention = MIXERS[config.mixer](config)
        self.feed_forward = FeedForward(config)
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)

    def forward(
        self, x: Tensor, segments: Segments, state: MixerState | None = None
    ) -> tuple[Tensor, MixerState | None]:
        """x: [B, s, D]; returns the same shape and the mixer's new state (None without one)."""
        y, state = self.attention(self.attention_norm(x), segments, state)
        x = x + y
        return x + self.feed_forward(self.ffn_norm(x)), state
