"""What makes the modular body a language model, and a dense one in the limit."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from modular_lm.config.schema import ModelConfig
from modular_lm.model.lm import LanguageModel
from modular_lm.model.sizes import sizes_of

from .tiny_models import (
    MODES,
    READING_MODES,
    VOCAB,
    assert_equal_in_fp64,
    model_keys,
    some_documents,
    some_tokens,
    tiny_config,
    tiny_model,
)


def dense(
    weights: dict[str, torch.Tensor],
    config: ModelConfig,
    tokens: torch.Tensor,
    visible: torch.Tensor | None = None,
) -> Any:
    """Llama, written down once more as plain functions of a state dict.

    visible: [T, T] or [B, T, T], which tokens see which; default: those up to their own.
    """
    z = sizes_of(config)

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return F.rms_norm(x, (z.dim,), weights[f"{name}.weight"], config.norm_eps)

    def times(x: torch.Tensor, name: str) -> torch.Tensor:
        return x @ weights[f"{name}.weight"].T

    frequency = config.rope_theta ** -(torch.arange(0, z.head_dim, 2).double() / z.head_dim)
    angle = torch.arange(tokens.shape[1]).double()[:, None, None] * frequency
    cos, sin = (f(angle).to(weights["norm.weight"].dtype) for f in (torch.cos, torch.sin))

    def rope(x: torch.Tensor) -> torch.Tensor:
        a, b = x[..., 0::2], x[..., 1::2]
        return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)

    h = weights["tok_embeddings.weight"][tokens]
    for i in range(z.n_layers):
        at = f"layers.{i}"
        x = norm(h, f"{at}.attention_norm")
        q, k, v = (times(x, f"{at}.attention.w{n}").unflatten(-1, (-1, z.head_dim)) for n in "qkv")
        q, k, v = rope(q).transpose(1, 2), rope(k).transpose(1, 2), v.transpose(1, 2)
        k, v = (x.repeat_interleave(z.n_heads // z.n_kv_heads, dim=1) for x in (k, v))
        seen = visible[:, None] if visible is not None and visible.dim() == 3 else visible
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, is_causal=seen is None)
        h = h + times(y.transpose(1, 2).flatten(-2), f"{at}.attention.wo")
        x = norm(h, f"{at}.ffn_norm")
        gate = F.silu(times(x, f"{at}.feed_forward.w1"))
        h = h + times(gate * times(x, f"{at}.feed_forward.w3"), f"{at}.feed_forward.w2")
    return times(norm(h, "norm"), "tok_embeddings" if config.weight_tying else "output")


def with_keys(model: LanguageModel, **keys: Any) -> LanguageModel:
    """The same weights under other keys that change no parameter."""
    other = LanguageModel(dataclasses.replace(model.config, **keys))
    other.to(model.tok_embeddings.weight.dtype).load_state_dict(model.state_dict())
    return other


# The dense limit


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@given(keys=model_keys(), length=st.integers(1, 20), longer=st.integers(0, 5))
@settings(deadline=None, max_examples=20)
def test_one_chunk_is_the_dense_transformer_to_the_bit(
    dtype: torch.dtype, keys: dict[str, Any], length: int, longer: int
) -> None:
    m = keys["module_n_summary"]
    keys["module_seq_len"] = m * (-(-length // m) + longer)
    keys["module_lookback"] = min(keys["module_lookback"], keys["module_seq_len"])
    model = tiny_model(dtype, **keys)
    tokens = some_tokens(2, length)
    logits = model(tokens)
    assert torch.equal(logits, dense(dict(model.state_dict()), model.config, tokens))
    assert torch.equal(logits, with_keys(model, module_seq_len=None)(tokens))


def test_sites_of_a_single_chunk_get_no_gradient() -> None:
    model = tiny_model(module_agg="stack", module_seq_len=8)
    model(some_tokens(2, 8), some_tokens(2, 8, seed=1)).sum().backward()
    assert len(list(model.aggs.parameters())) > 0
    assert all(p.grad is None for p in model.aggs.parameters())
    assert all(p.grad is not None for p in model.layers.parameters())


@given(keys=model_keys(modes=("drop",), lookback=False), length=st.integers(2, 24))
@settings(deadline=None, max_examples=20)
def test_drop_is_the_dense_model_on_each_chunk(keys: dict[str, Any], length: int) -> None:
    model = tiny_model(**keys)
    tokens = some_tokens(2, length)
    alone = with_keys(model, module_seq_len=None)
    expected = torch.cat([alone(c) for c in tokens.split(keys["module_seq_len"], dim=1)], dim=1)
    assert_equal_in_fp64(model(tokens), expected)


@given(keys=model_keys(modes=READING_MODES), length=st.integers(1, 24))
@settings(deadline=None, max_examples=20)
def test_every_mode_starts_as_drop(keys: dict[str, Any], length: int) -> None:
    tokens = some_tokens(2, length)
    model = tiny_model(torch.float32, reading=False, **keys)
    keys["module_agg"] = "drop"
    assert torch.equal(model(tokens), tiny_model(torch.float32, **keys)(tokens))


# Look-back, window, documents


@given(keys=model_keys(modes=("drop",)), length=st.integers(1, 24), packed=st.booleans())
@settings(deadline=None, max_examples=40)
def test_drop_with_look_back_is_the_dense_model_with_a_mask(
    keys: dict[str, Any], length: int, packed: bool
) -> None:
    """Token t sees its chunk and `module_lookback` tokens before it; positions may go on counting,
    since only their differences matter."""
    model = tiny_model(**keys)
    tokens = some_tokens(2, length)
    j, t = torch.arange(length), torch.arange(length)[:, None]
    chunk = keys["module_seq_len"]
    visible = (j <= t) & (j >= t // chunk * chunk - keys["module_lookback"])
    documents = some_documents(2, length) if packed else None
    if documents is not None:
        visible = visible & (documents[:, :, None] == documents[:, None, :])
    expected = dense(dict(model.state_dict()), model.config, tokens, visible)
    assert_equal_in_fp64(model(tokens, documents=documents), expected)


@given(window=st.integers(1, 12), length=st.integers(1, 24), packed=st.booleans())
@settings(deadline=None, max_examples=30)
def test_a_sliding_window_is_the_dense_model_with_a_mask(
    window: int, length: int, packed: bool
) -> None:
    model = tiny_model(sliding_window=window, n_kv_heads=1)
    tokens = some_tokens(2, length)
    distance = torch.arange(length)[:, None] - torch.arange(length)
    visible = (distance >= 0) & (distance < window)
    documents = some_documents(2, length) if packed else None
    if documents is not None:
        visible = visible & (documents[:, :, None] == documents[:, None, :])
    expected = dense(dict(model.state_dict()), model.config, tokens, visible)
    assert_equal_in_fp64(model(tokens, documents=documents), expected)


def test_baselines_have_the_trunk_and_the_initial_weights_of_every_mode() -> None:
    baselines = [{"sliding_window": 4}, {"module_seq_len": None}]
    modes = [{"module_agg": m, "module_seq_len": 4, "module_lookback": 2} for m in MODES]
    models = [tiny_model(torch.float32, reading=False, **keys) for keys in baselines + modes]
    trunk = {n: w for n, w in models[0].state_dict().items() if not n.startswith("aggs")}
    for model in models:
        weights = model.state_dict()
        assert {n for n in weights if not n.startswith("aggs")} == trunk.keys()
        assert all(torch.equal(weights[n], trunk[n]) for n in trunk)


@given(keys=model_keys(), length=st.integers(2, 24), seed=st.integers(0, 99), data=st.data())
@settings(deadline=None, max_examples=40)
def test_a_document_changes_no_bit_of_another_one(
    keys: dict[str, Any], length: int, seed: int, data: st.DataObject
) -> None:
    model = tiny_model(torch.float32, **keys)
    tokens, documents = some_tokens(2, length), some_documents(2, length, seed)
    at = data.draw(st.integers(0, length - 1))
    touched = documents == documents[:, at : at + 1]
    other = torch.where(touched, (tokens + 1 + some_tokens(2, length, seed=1) % 20) % VOCAB, tokens)
    before, after = model(tokens, documents=documents), model(other, documents=documents)
    assert torch.equal(before[~touched], after[~touched])
    assert not torch.equal(before[:, at], after[:, at])


@given(keys=model_keys(), lengths=st.lists(st.integers(1, 12), min_size=1, max_size=3))
@settings(deadline=None, max_examples=40)
def test_documents_that_begin_with_a_chunk_are_as_if_alone(
    keys: dict[str, Any], lengths: list[int]
) -> None:
    """Others are cut into chunks elsewhere. The rest of a last chunk is a document of its own."""
    chunk = keys["module_seq_len"]
    model = tiny_model(**keys)
    rows, owners, alone = [], [], []
    for number, length in enumerate(lengths):
        document = some_tokens(1, length, seed=number)
        filled = -(-length // chunk) * chunk
        rows.append(F.pad(document, (0, filled - length), value=7))
        owner = torch.full((1, filled), 2 * number)
        owner[:, length:] += 1
        owners.append(owner)
        alone.append(model(document))
    logits = model(torch.cat(rows, dim=1), documents=torch.cat(owners, dim=1))
    starts = [0, *itertools.accumulate(row.shape[1] for row in rows)]
    for start, length, expected in zip(starts, lengths, alone, strict=False):
        assert_equal_in_fp64(logits[:, start : start + length], expected)


@given(keys=model_keys(), length=st.integers(1, 24))
@settings(deadline=None, max_examples=20)
def test_one_document_is_as_none(keys: dict[str, Any], length: int) -> None:
    model = tiny_model(**keys)
    tokens = some_tokens(2, length)
    documents = torch.zeros(2, length, dtype=torch.int64)
    assert_equal_in_fp64(model(tokens, documents=documents), model(tokens))


# Causality


@given(keys=model_keys(), length=st.integers(2, 24), data=st.data())
@settings(deadline=None, max_examples=30)
def test_later_tokens_change_no_bit_of_earlier_logits(
    keys: dict[str, Any], length: int, data: st.DataObject
) -> None:
    model = tiny_model(torch.float32, **keys)
    at = data.draw(st.integers(1, length - 1))
    tokens = some_tokens(2, length)
    other = tokens.clone()
    other[:, at:] = (other[:, at:] + 1 + some_tokens(2, length - at, seed=1) % 20) % VOCAB
    before, after = model(tokens), model(other)
    assert torch.equal(before[:, :at], after[:, :at])
    assert not torch.equal(before[:, at], after[:, at])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("m", "pool", "lookback"), [(1, "mean", 0), (2, "mean", 0), (2, "last", 0), (1, "mean", 2)]
)
def test_a_token_depends_on_what_it_may_see_and_nothing_else(
    mode: str, m: int, pool: str, lookback: int
) -> None:
    """The gradient of position t reaches the embedding at j iff j <= t and, with `drop`, j lies
    in t's chunk or as far before as the layers look back. All tokens differ, so a row of the table
    is a position."""
    length, chunk = 14, 4
    model = tiny_model(
        module_agg=mode,
        module_seq_len=chunk,
        module_n_summary=m,
        module_pool=pool,
        module_lookback=lookback,
        n_layers=2,
    )
    tokens = torch.arange(length)[None]
    logits = model(tokens)
    readout = torch.randn(VOCAB, dtype=logits.dtype, generator=torch.Generator().manual_seed(0))
    reached = []
    for t in range(length):
        (grad,) = torch.autograd.grad(
            logits[0, t] @ readout, model.tok_embeddings.weight, retain_graph=True
        )
        reached.append((grad[:length] != 0).any(-1))
    j, t = torch.arange(length), torch.arange(length)[:, None]
    seen = ((j <= t) & (j >= t // chunk * chunk - lookback)).long()
    allowed = (j <= t) & ((seen @ seen > 0) | (mode != "drop"))  # a path through two layers
    assert torch.equal(torch.stack(reached), allowed)


@given(keys=model_keys(), length=st.integers(1, 24))
@settings(deadline=None, max_examples=8)
def test_logits_of_a_prefix_do_not_depend_on_how_long_the_input_is(
    keys: dict[str, Any], length: int
) -> None:
    """At every length: so padding to whole chunks, and right-padded batches, are harmless."""
    model = tiny_model(**keys)
    tokens = some_tokens(1, length)
    whole = model(tokens)
    for n in range(1, length):
        assert_equal_in_fp64(model(tokens[:, :n]), whole[:, :n])


def test_rows_of_a_batch_do_not_mix() -> None:
    for mode in MODES:
        model = tiny_model(module_agg=mode, module_seq_len=4)
        tokens = some_tokens(3, 14)
        for row in range(3):
            alone = model(tokens[row : row + 1])
            assert_equal_in_fp64(model(tokens)[row : row + 1], alone)


# Parameters


@pytest.mark.parametrize("mode", MODES)
def test_parameters_do_not_depend_on_the_chunk_length(mode: str) -> None:
    shapes = [
        {n: p.shape for n, p in LanguageModel(tiny_config(**keys)).named_parameters()}
        for keys in (
            {"module_agg": mode, "module_seq_len": chunk, "module_n_summary": 2}
            for chunk in (None, 2, 64)
        )
    ]
    assert shapes[0] == shapes[1] == shapes[2]


def test_the_trunk_has_the_names_of_meta_and_nothing_is_a_buffer() -> None:
    model = tiny_model(module_agg="stack", n_layers=2, module_n_layers=1)
    layer = [f"attention.w{n}" for n in "qkvo"] + [f"feed_forward.w{n}" for n in "123"]
    layer += ["attention_norm", "ffn_norm"]
    site = ["norm", "query_norm", "wq", "wk", "wv", "wo"]
    names = ["tok_embeddings", "norm", "output", *(f"aggs.0.{n}" for n in site)]
    names += [f"layers.{i}.{n}" for i in range(2) for n in layer]
    assert {n for n, _ in model.named_parameters()} == {f"{n}.weight" for n in names}
    assert list(model.buffers()) == []


def test_a_dense_checkpoint_behaves_as_drop_in_any_mode() -> None:
    dense_model = tiny_model(module_agg="drop")
    tokens = some_tokens(1, 12)
    drop = with_keys(dense_model, module_seq_len=4)
    for mode in READING_MODES:
        model = tiny_model(reading=False, seed=1, module_agg=mode, module_seq_len=4)
        missing, unexpected = model.load_state_dict(dense_model.state_dict(), strict=False)
        assert unexpected == []
        assert {name.split(".")[0] for name in missing} == {"aggs"}
        assert torch.equal(model(tokens), drop(tokens))
