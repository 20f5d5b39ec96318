"""The sizes that follow from a resolved `ModelConfig`, as plain integers.

One truth for the layers that allocate and the formulas that count (`flops`); imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass

from modular_lm.config.schema import ModelConfig


@dataclass(frozen=True)
class Sizes:
    """Widths and counts of a model.

    attn_dim, kv_dim: width of all query heads, of all key (or value) heads
    ffn_dim: hidden width of the feed-forward
    agg_dim: width of the memory attention of `stack`
    modules: the layers of each module, in order; between two modules lies an aggregation site
    """

    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    ffn_dim: int
    vocab_size: int
    agg_dim: int
    modules: tuple[range, ...]

    @property
    def attn_dim(self) -> int:
        return self.n_heads * self.head_dim

    @property
    def kv_dim(self) -> int:
        return self.n_kv_heads * self.head_dim


def sizes_of(config: ModelConfig) -> Sizes:
    """The sizes of a resolved config. Raises ValueError for one that is not resolved."""
    heads, kv_heads, head_dim = config.n_heads, config.n_kv_heads, config.head_dim
    per_module, agg_dim = config.module_n_layers, config.module_agg_dim
    scale, known_vocab = config.module_sum_scale, config.vocab_size > 0
    if not (heads and kv_heads and head_dim and per_module and agg_dim and scale and known_vocab):
        raise ValueError("expected a resolved ModelConfig: pass it through resolve_model first")
    return Sizes(
        dim=config.dim,
        n_layers=config.n_layers,
        n_heads=heads,
        n_kv_heads=kv_heads,
        head_dim=head_dim,
        ffn_dim=_ffn_dim(config),
        vocab_size=config.vocab_size,
        agg_dim=agg_dim,
        modules=tuple(
            range(first, min(first + per_module, config.n_layers))
            for first in range(0, config.n_layers, per_module)
        ),
    )


BASE = "base"
"""The name of the column that a model begins with."""


def column_names(config: ModelConfig) -> tuple[str, ...]:
    """All columns, by their numbers: the base is 0."""
    return (BASE, *config.module_names)


def column_number(config: ModelConfig, name: str) -> int:
    """Raises ValueError for a name that is no column's."""
    return column_names(config).index(name)


def n_sites(config: ModelConfig) -> int:
    """Aggregation sites that hold parameters: none with `drop`, where nothing is read."""
    return 0 if config.module_agg == "drop" else len(sizes_of(config).modules) - 1


def _ffn_dim(config: ModelConfig) -> int:
    """Llama's rule: two thirds of 4 dim, scaled, rounded up to a multiple."""
    hidden = int(2 * 4 * config.dim / 3)
    if config.ffn_dim_multiplier is not None:
        hidden = int(config.ffn_dim_multiplier * hidden)
    return -(-hidden // config.multiple_of) * config.multiple_of
