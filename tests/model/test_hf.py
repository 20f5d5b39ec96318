"""Hugging Face's Llama: the same function as ours after import, the same tensors after export."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from modular_lm.config.schema import ModelConfig
from modular_lm.errors import CheckpointError
from modular_lm.model.foreign import dense_config, ffn_rule
from modular_lm.model.hf import (
    config_from_hf,
    config_to_hf,
    read_hf,
    state_from_hf,
    state_to_hf,
    write_hf,
)
from modular_lm.model.lm import LanguageModel
from modular_lm.model.meta import read_meta
from modular_lm.model.sizes import sizes_of

TINY: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 16,
    "intermediate_size": 44,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 24,
    "max_position_embeddings": 32,
    "rms_norm_eps": 1e-5,
}


def hf_tensors(hf: Mapping[str, Any], seed: int = 0) -> dict[str, Tensor]:
    """Random weights of the Llama that a config.json describes, under Hugging Face's names."""
    d, hidden, heads = hf["hidden_size"], hf["intermediate_size"], hf["num_attention_heads"]
    width = hf.get("head_dim") or d // heads
    kv = width * hf.get("num_key_value_heads", heads)
    layer = {
        "input_layernorm": (d,),
        "post_attention_layernorm": (d,),
        "self_attn.q_proj": (width * heads, d),
        "self_attn.k_proj": (kv, d),
        "self_attn.v_proj": (kv, d),
        "self_attn.o_proj": (d, width * heads),
        "mlp.gate_proj": (hidden, d),
        "mlp.up_proj": (hidden, d),
        "mlp.down_proj": (d, hidden),
    }
    shapes = {"model.embed_tokens": (hf["vocab_size"], d), "model.norm": (d,)}
    for i in range(hf["num_hidden_layers"]):
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
    if not hf.get("tie_word_embeddings"):
        shapes["lm_head"] = (hf["vocab_size"], d)
    generator = torch.Generator().manual_seed(seed)
    return {
        f"{name}.weight": torch.randn(shape, generator=generator) * shape[-1] ** -0.5
        for name, shape in shapes.items()
    }


def hf_forward(hf: Mapping[str, Any], w: Mapping[str, Tensor], tokens: Tensor) -> Tensor:
    """Logits [T, V] of tokens [T], written from the definition of Hugging Face's Llama."""
    heads, kv_heads = hf["num_attention_heads"], hf["num_key_value_heads"]
    width = hf.get("head_dim") or hf["hidden_size"] // heads
    length = len(tokens)
    theta = hf.get("rope_theta", 10000.0)
    frequencies = theta ** -(torch.arange(0, width, 2, dtype=torch.float64) / width)
    angles = torch.arange(length)[:, None] * frequencies
    cos, sin = (torch.cat((x, x), -1) for x in (angles.cos(), angles.sin()))

    def norm(x: Tensor, name: str) -> Tensor:
        scale = (x.pow(2).mean(-1, keepdim=True) + hf["rms_norm_eps"]).rsqrt()
        return x * scale * w[f"{name}.weight"]

    def turn(x: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        return x * cos + torch.cat((-second, first), -1) * sin

    h = w["model.embed_tokens.weight"][tokens]
    for i in range(hf["num_hidden_layers"]):
        p = f"model.layers.{i}"
        x = norm(h, f"{p}.input_layernorm")
        q, k, v = (
            (x @ w[f"{p}.self_attn.{n}_proj.weight"].T).view(length, -1, width).transpose(0, 1)
            for n in "qkv"
        )
        q, k = turn(q), turn(k)
        k, v = (y.repeat_interleave(heads // kv_heads, 0) for y in (k, v))
        scores = q @ k.transpose(1, 2) * width**-0.5
        scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf)
        y = (scores.softmax(-1) @ v).transpose(0, 1).flatten(1)
        h = h + y @ w[f"{p}.self_attn.o_proj.weight"].T
        x = norm(h, f"{p}.post_attention_layernorm")
        gate = F.silu(x @ w[f"{p}.mlp.gate_proj.weight"].T)
        h = h + (gate * (x @ w[f"{p}.mlp.up_proj.weight"].T)) @ w[f"{p}.mlp.down_proj.weight"].T
    head = w.get("lm_head.weight", w["model.embed_tokens.weight"])
    return norm(h, "model.norm") @ head.T


def load(config: ModelConfig, state: dict[str, Tensor]) -> LanguageModel:
    model = LanguageModel(config)
    model.load_state_dict(state)
    return model.eval()


@st.composite
def llamas(draw: st.DrawFn) -> dict[str, Any]:
    kv_heads = draw(st.integers(1, 2))
    heads = kv_heads * draw(st.integers(1, 2))
    width = draw(st.sampled_from([2, 4, 6]))
    own_width = draw(st.booleans())
    return {
        **TINY,
        "hidden_size": draw(st.sampled_from([8, 12])) if own_width else heads * width,
        "intermediate_size": draw(st.integers(1, 60)),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": width if own_width else None,
        "num_hidden_layers": draw(st.integers(1, 2)),
        "tie_word_embeddings": draw(st.booleans()),
        "rope_theta": draw(st.sampled_from([100.0, 500000.0])),
    }


@settings(deadline=None, max_examples=25)
@given(hf=llamas(), seed=st.integers(0, 9))
def test_imported_it_is_the_function_of_an_independent_llama(hf: dict[str, Any], seed: int) -> None:
    tensors = hf_tensors(hf, seed)
    config, _ = config_from_hf(hf)
    model = load(config, state_from_hf(tensors, config)).double()
    tokens = torch.randint(24, (11,), generator=torch.Generator().manual_seed(seed))
    expected = hf_forward(hf, {n: t.double() for n, t in tensors.items()}, tokens)
    with torch.no_grad():
        assert torch.allclose(model(tokens[None])[0], expected, rtol=0, atol=1e-10)


@settings(deadline=None, max_examples=25)
@given(hf=llamas())
def test_import_and_export_undo_each_other(hf: dict[str, Any]) -> None:
    config, seq_len = config_from_hf(hf)
    tensors = hf_tensors(hf)
    back = state_to_hf(state_from_hf(tensors, config), config)
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[name], tensors[name]) for name in tensors)
    written = config_to_hf(config, seq_len, 1, 2)
    assert config_from_hf(written) == (config, seq_len)
    assert {k: v for k, v in hf.items() if v is not None and written[k] != v} == {}


@settings(deadline=None)
@given(dim=st.integers(2, 4096), width=st.integers(1, 20000))
def test_every_feed_forward_width_is_met_exactly(dim: int, width: int) -> None:
    config = dense_config(width, 16, "x", dim=2 * dim, n_layers=1, n_heads=1, vocab_size=8)
    assert sizes_of(config).ffn_dim == width


def test_widths_that_rounding_gives_need_no_multiplier() -> None:
    assert ffn_rule(64, 172) == (4, None)
    assert ffn_rule(4096, 11008) == (128, None)


def test_types_of_half_precision_are_widened_exactly() -> None:
    config, _ = config_from_hf(TINY)
    for dtype in (torch.bfloat16, torch.float16):
        tensors = {n: t.to(dtype) for n, t in hf_tensors(TINY).items()}
        state = state_from_hf(tensors, config)
        assert torch.equal(state["output.weight"], tensors["lm_head.weight"].float())
        assert all(t.dtype == torch.float32 for t in state.values())


def test_defaults_and_the_newer_way_to_write_rope() -> None:
    few = {k: v for k, v in TINY.items() if k not in ("num_key_value_heads", "rms_norm_eps")}
    config, seq_len = config_from_hf(few)
    assert (config.n_kv_heads, config.head_dim, config.norm_eps) == (4, 4, 1e-6)
    assert (config.rope_theta, seq_len, config.module_agg) == (10000.0, 32, "drop")
    newer = {**TINY, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}
    assert config_from_hf(newer)[0].rope_theta == 5e5


# ------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mistral"}, 'model_type="mistral": not a plain Llama, expected "llama"'),
        ({"architectures": ["LlamaForSequenceClassification"]}, "architectures="),
        ({"attention_bias": True}, "attention_bias=true"),
        ({"mlp_bias": True}, "mlp_bias=true"),
        ({"hidden_act": "gelu"}, 'hidden_act="gelu"'),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_scaling="),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_parameters="),
        ({"sliding_window": 16}, "sliding_window=16"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ({"quantization_config": {"bits": 4}}, "quantization_config="),
        ({"hidden_size": None}, "hidden_size=None: expected a whole number >= 1"),
        ({"vocab_size": "many"}, "vocab_size=many: expected a whole number"),
        ({"num_hidden_layers": 1.5}, "num_hidden_layers=1.5: expected a whole number"),
        ({"rms_norm_eps": 0}, "rms_norm_eps=0: expected a number > 0"),
        ({"head_dim": 3}, "model.head_dim=3: must be even"),
        ({"num_key_value_heads": 3}, "model.n_kv_heads=3: must divide"),
    ],
)
def test_anything_but_a_plain_llama_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        config_from_hf({**TINY, **changes}, "f/config.json")
    assert str(caught.value).startswith(f"f/config.json: {message}")


def test_a_tensor_that_does_not_fit_is_named() -> None:
    config, _ = config_from_hf(TINY)
    tensors = hf_tensors(TINY)
    norm, up = "model.norm.weight", "model.layers.1.mlp.up_proj.weight"
    cases = {
        f"tensor {norm} is missing": {n: t for n, t in tensors.items() if n != norm},
        "tensor model.layers.0.self_attn.q_proj.bias has no place": {
            **tensors,
            "model.layers.0.self_attn.q_proj.bias": torch.zeros(16),
        },
        f"tensor {up} has the shape [44, 15], expected [44, 16]": {
            **tensors,
            up: torch.zeros(44, 15),
        },
        f"tensor {up} is torch.int8": {**tensors, up: tensors[up].to(torch.int8)},
    }
    for message, given_tensors in cases.items():
        with pytest.raises(CheckpointError) as caught:
            state_from_hf(given_tensors, config, "model.safetensors")
        assert str(caught.value).startswith(f"model.safetensors: {message}")


def test_a_tied_head_may_be_saved_too_but_must_be_the_embedding() -> None:
    tied = {**TINY, "tie_word_embeddings": True}
    config, _ = config_from_hf(tied)
    tensors = hf_tensors(tied)
    copy = {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
    assert state_from_hf(copy, config).keys() == state_from_hf(tensors, config).keys()
    copy["lm_head.weight"][0, 0] += 1
    with pytest.raises(CheckpointError, match=r"lm_head\.weight differs from model\.embed_tokens"):
        state_from_hf(copy, config)


def test_derived_buffers_are_ignored() -> None:
    config, _ = config_from_hf(TINY)
    tensors = hf_tensors(TINY)
    old = {**tensors, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(2)}
    assert state_from_hf(old, config).keys() == state_from_hf(tensors, config).keys()


# ------------------------------------------------------------------ files


def test_shards_are_read_by_their_index(tmp_path: Path) -> None:
    tensors = hf_tensors(TINY)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for folder in (whole, parts):
        folder.mkdir()
    write_hf(whole, TINY, tensors)
    names = sorted(tensors)
    files = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, mine in files.items():
        save_file({n: tensors[n] for n in mine}, parts / file)
    weight_map = {n: file for file, mine in files.items() for n in mine}
    (parts / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (parts / "config.json").write_text(json.dumps(TINY))
    (config, _, one), (other_config, _, other) = read_hf(whole), read_hf(parts)
    assert config == other_config
    assert all(torch.equal(one[n], other[n]) for n in one)

    (parts / "b.safetensors").write_bytes((parts / "b.safetensors").read_bytes()[:-8])
    with pytest.raises(CheckpointError, match=r"b\.safetensors: not readable as safetensors"):
        read_hf(parts)
    (parts / "b.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"b\.safetensors"):
        read_hf(parts)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "config.json: no such file"),
        ({"config.json": "{"}, "config.json: not readable as JSON"),
        ({"config.json": "[]"}, "config.json: expected a JSON object, found a list"),
        ({"config.json": json.dumps(TINY)}, "holds neither model.safetensors nor"),
        (
            {"config.json": json.dumps(TINY), "model.safetensors": "text"},
            "model.safetensors: not readable as safetensors",
        ),
        (
            {"config.json": json.dumps(TINY), "model.safetensors.index.json": "{}"},
            "model.safetensors.index.json: expected a weight_map",
        ),
    ],
)
def test_a_broken_folder_names_the_file(
    tmp_path: Path, files: dict[str, str], message: str
) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(CheckpointError) as caught:
        read_hf(tmp_path)
    assert message in str(caught.value)
    assert str(caught.value).startswith(str(tmp_path))


# ------------------------------------------------------------------ golden


def test_stories260k_gives_the_golden_logits_from_both_formats(shared_data: Path) -> None:
    folder = shared_data / "golden" / "stories260K"
    golden = np.load(folder / "golden_logits.npz")
    config, seq_len, state = read_hf(folder / "hf")
    assert (config.multiple_of, config.ffn_dim_multiplier, seq_len) == (4, None, 512)
    tokens = torch.from_numpy(golden["tokens"])[None]
    with torch.no_grad():
        logits = load(config, state)(tokens)[0].numpy()
    assert np.abs(logits - golden["logits_f64"]).max() < 1e-4
    other_config, _, other = read_meta(folder / "meta")
    assert other_config == config
    assert other.keys() == state.keys()
    assert all(torch.equal(other[name], state[name]) for name in state)
