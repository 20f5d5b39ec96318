"""Models small enough to compare bit by bit, and the shapes that property tests draw."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st
from torch import nn

from modular_lm.config.checks import resolve_model
from modular_lm.config.schema import ModelConfig
from modular_lm.model.init import init_weights
from modular_lm.model.lm import LanguageModel

VOCAB = 40
READING_MODES = ("avg", "sum", "stack")
MODES = ("drop", *READING_MODES)


def tiny_config(seq_len: int = 32, **keys: Any) -> ModelConfig:
    """A resolved config of width 16; `keys` as in `model.*`."""
    defaults: dict[str, Any] = {"dim": 16, "n_layers": 3, "n_heads": 2, "multiple_of": 8}
    return resolve_model(ModelConfig(**(defaults | keys)), seq_len, VOCAB)


def tiny_model(
    dtype: torch.dtype = torch.float64, *, seed: int = 0, reading: bool = True, **keys: Any
) -> LanguageModel:
    """With `reading`, the output projections of the sites are drawn too, so that sites act."""
    model = LanguageModel(tiny_config(**keys)).to(dtype)
    init_weights(model, seed)
    if reading:
        generator = torch.Generator().manual_seed(seed)
        for agg in model.aggs:
            wo = agg.get_parameter("wo.weight")
            nn.init.normal_(wo, std=0.5, generator=generator)
    return model


def some_documents(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    """[B, T] ids that grow along a row, of documents of a few tokens."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(batch, length, generator=generator) < 0.2).long().cumsum(1)


def some_tokens(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def assert_equal_in_fp64(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-11)


@st.composite
def model_keys(
    draw: st.DrawFn, modes: tuple[str, ...] = MODES, *, lookback: bool = True
) -> dict[str, Any]:
    """`model.*` keys over all modes, chunk lengths, look-backs, module depths and head counts."""
    n_summary = draw(st.sampled_from([1, 2, 3]))
    chunk = n_summary * draw(st.integers(1, 4))
    return {
        "module_agg": draw(st.sampled_from(modes)),
        "module_n_summary": n_summary,
        "module_seq_len": chunk,
        "module_lookback": draw(st.just(0) | st.integers(0, chunk)) if lookback else 0,
        "module_pool": draw(st.sampled_from(["mean", "last"])),
        "module_agg_dim": draw(st.sampled_from([4, 8])),
        "n_layers": draw(st.integers(2, 4)),
        "module_n_layers": draw(st.integers(1, 2)),
        "n_kv_heads": draw(st.sampled_from([1, 2])),
        "weight_tying": draw(st.booleans()),
    }
