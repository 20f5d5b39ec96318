from __future__ import annotations

import pytest

from modular_lm.config.schema import ModelConfig
from modular_lm.model.sizes import n_sites, sizes_of

from .tiny_models import tiny_config


@pytest.mark.parametrize(
    ("dim", "multiplier", "multiple_of", "expected"),
    [
        (4096, None, 256, 11008),  # Llama 2 7B
        (5120, None, 256, 13824),  # Llama 2 13B
        (4096, 1.3, 1024, 14336),  # Llama 3 8B
        (8192, 1.3, 4096, 28672),  # Llama 3 70B
        (64, None, 4, 172),  # stories260K
        (64, None, 1, 170),
        (64, 1.3, 1, 221),
    ],
)
def test_feed_forward_width_of_published_models(
    dim: int, multiplier: float | None, multiple_of: int, expected: int
) -> None:
    config = tiny_config(dim=dim, ffn_dim_multiplier=multiplier, multiple_of=multiple_of)
    assert sizes_of(config).ffn_dim == expected


def test_modules_are_runs_of_layers_and_the_last_may_be_shorter() -> None:
    config = tiny_config(n_layers=7, module_n_layers=3, module_agg="avg")
    assert sizes_of(config).modules == (range(3), range(3, 6), range(6, 7))
    assert n_sites(config) == 2


def test_drop_and_single_modules_have_no_sites() -> None:
    assert n_sites(tiny_config(n_layers=4, module_n_layers=1, module_agg="drop")) == 0
    assert n_sites(tiny_config(n_layers=4, module_n_layers=4, module_agg="stack")) == 0


def test_an_unresolved_config_is_refused() -> None:
    with pytest.raises(ValueError, match="resolve_model"):
        sizes_of(ModelConfig())
