from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from modular_lm.model.flops import flops_per_token, parameters
from modular_lm.model.lm import LanguageModel
from modular_lm.model.sizes import n_sites, sizes_of

from .tiny_models import MODES, model_keys, some_tokens, tiny_config, tiny_model


@given(keys=model_keys())
@settings(deadline=None, max_examples=30)
def test_parameters_are_those_of_the_model(keys: dict[str, Any]) -> None:
    config = tiny_config(ffn_dim_multiplier=1.3, **keys)
    with torch.device("meta"):
        shapes = {n: p.numel() for n, p in LanguageModel(config).named_parameters()}
    found = parameters(config)
    norms = {n for n in shapes if n.endswith("norm.weight") and not n.startswith("aggs")}
    matrices = {n for n in shapes if n.startswith("layers")} - norms
    assert found.total == sum(shapes.values())
    assert found.embedding == shapes["tok_embeddings.weight"]
    assert found.head == shapes.get("output.weight", 0)
    assert found.non_embedding == found.total - found.embedding
    assert found.layers == sum(shapes[n] for n in matrices)
    assert found.norms == sum(shapes[n] for n in norms)
    assert found.aggs == sum(v for n, v in shapes.items() if n.startswith("aggs"))
    assert found.matmul == found.layers + shapes["tok_embeddings.weight"]


def test_a_site_of_any_mode_has_dim_squared_parameters() -> None:
    extra = {
        mode: parameters(tiny_config(module_agg=mode, module_n_layers=1, n_layers=3)).aggs
        for mode in MODES
    }
    assert extra == {"drop": 0, "avg": 2 * 272, "sum": 2 * 272, "stack": 2 * 288}


def attention_pairs(config: Any, seq_len: int) -> tuple[int, int]:
    """Visible (query, key) pairs of a layer and of a site of `stack`, by building the masks."""
    chunk = config.module_seq_len or seq_len
    at = torch.arange(seq_len)
    first = at[:, None] // chunk * chunk - config.module_lookback
    if config.sliding_window is not None:
        first = at[:, None] - config.sliding_window + 1
    local = (at <= at[:, None]) & (at >= first)
    owner = torch.arange(-(-seq_len // chunk)).repeat_interleave(config.module_n_summary)
    memory = owner < (at // chunk)[:, None]
    return int(local.sum()), int(memory.sum()) + seq_len  # and the zero slot


@given(keys=model_keys(), window=st.integers(0, 9), seq_len=st.integers(1, 30))
@settings(deadline=None, max_examples=60)
def test_attention_terms_count_visible_pairs(
    keys: dict[str, Any], window: int, seq_len: int
) -> None:
    if window:
        keys |= {"module_seq_len": None, "sliding_window": window}
    config = tiny_config(**keys)
    z = sizes_of(config)
    local, memory = attention_pairs(config, seq_len)
    total = 6 * parameters(config).matmul * seq_len + 12 * z.n_layers * z.attn_dim * local
    n_chunks = -(-seq_len // (config.module_seq_len or seq_len))
    if n_chunks > 1 and config.module_agg in ("avg", "sum"):
        total += n_sites(config) * 6 * z.dim**2 * n_chunks
    elif n_chunks > 1 and config.module_agg == "stack":
        tokens = seq_len + n_chunks * config.module_n_summary
        linear = 12 * z.dim * z.agg_dim * tokens
        total += n_sites(config) * (linear + 12 * z.agg_dim * memory)
    assert flops_per_token(config, seq_len) * seq_len == pytest.approx(total, rel=1e-12)


def counted(model: LanguageModel, batch: int, seq_len: int) -> int:
    tokens = some_tokens(batch, seq_len)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(tokens, tokens).sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("tying", [False, True])
@pytest.mark.parametrize("n_chunks", [1, 4])
def test_torch_counts_the_same_but_for_the_masked_half(
    mode: str, tying: bool, n_chunks: int
) -> None:
    """PyTorch's counter books every pair of a masked attention; all else must agree exactly."""
    seq_len, m, batch = 24, 2, 2
    chunk = seq_len // n_chunks
    keys = {"module_agg": mode, "module_n_summary": m, "weight_tying": tying, "n_kv_heads": 1}
    model = tiny_model(torch.float32, module_seq_len=chunk, n_layers=3, module_n_layers=1, **keys)
    z = sizes_of(model.config)
    local, memory = attention_pairs(model.config, seq_len)
    masked = z.n_layers * z.attn_dim * (seq_len * chunk - local)
    if mode == "stack" and n_chunks > 1:
        masked += 2 * z.agg_dim * (seq_len * (1 + m * n_chunks) - memory)
    expected = flops_per_token(model.config, seq_len) * seq_len + 12 * masked
    assert counted(model, batch, seq_len) == pytest.approx(batch * expected, rel=1e-12)


@pytest.mark.parametrize(
    "keys",
    [
        {"module_agg": "drop", "module_seq_len": 6, "module_lookback": 2},
        {"module_agg": "avg", "module_seq_len": 6, "module_lookback": 6},
        {"sliding_window": 6},
        {"sliding_window": 5},
    ],
)
def test_torch_counts_the_same_for_borders_and_windows(keys: dict[str, Any]) -> None:
    """But for masked pairs: chunks but the first are computed as squares of chunk + look-back, a
    window in blocks of its length that see the block before."""
    seq_len, batch = 24, 2
    model = tiny_model(torch.float32, n_layers=3, module_n_layers=1, **keys)
    z, window = sizes_of(model.config), model.config.sliding_window
    block = window or keys["module_seq_len"]
    n_blocks = -(-seq_len // block)
    of_others = 2 * block**2 if window else (block + keys["module_lookback"]) ** 2
    computed = block**2 + (n_blocks - 1) * of_others
    local, _ = attention_pairs(model.config, seq_len)
    masked = z.n_layers * z.attn_dim * (computed - local)
    expected = flops_per_token(model.config, seq_len) * seq_len + 12 * masked
    assert counted(model, batch, seq_len) == pytest.approx(batch * expected, rel=1e-12)


def test_known_numbers() -> None:
    """A 27 M trunk: chunks of 256 in 4096 tokens, by the formula of causal attention."""
    config = tiny_config(
        4096, dim=512, n_layers=8, n_heads=8, multiple_of=256, module_agg="drop", module_seq_len=256
    )
    n = 8 * (4 * 512**2 + 3 * 512 * 1536) + 40 * 512
    assert parameters(config).matmul == n
    assert flops_per_token(config, 4096) == 6 * n + 12 * 8 * 512 * 257 / 2
    assert flops_per_token(config, 256) == flops_per_token(config, 4096)


def test_formulas_need_no_torch() -> None:
    code = "import sys, modular_lm.model.flops; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
