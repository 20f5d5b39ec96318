from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modular_lm.config.schema import ModelConfig
from modular_lm.errors import ConfigError
from modular_lm.model import attention
from modular_lm.model.attention import ReadyMask, attend, choose_backends
from modular_lm.model.kernels import BACKENDS, Backend, block_diagonal
from modular_lm.model.masks import Mask, causal, everything

from .mask_strategy import masks, runs
from .tiny_models import model_keys, some_documents, some_tokens, tiny_config, tiny_model

CPU = torch.device("cpu")


def by_hand(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Mask) -> torch.Tensor:
    """softmax(q k / sqrt(d)) v with explicit scores; each key head serves a run of query heads."""
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], dim=2) for x in (k, v))
    visible = mask.dense(CPU)
    visible = visible[:, None] if visible.dim() == 3 else visible
    scores = torch.einsum("bshd,bnhd->bhsn", q, k) / math.sqrt(q.shape[-1])
    weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
    return torch.einsum("bhsn,bnhd->bshd", weights, v)


def by(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Mask, backend: str = "sdpa"
) -> torch.Tensor:
    return attend(q, k, v, ReadyMask(mask, len(q), CPU, {mask.kind: backend}))


def random_qkv(
    mask: Mask, kv_heads: int, width: int = 8, dtype: torch.dtype = torch.float64
) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(mask.q_len * 100 + mask.k_len)
    shapes = ((2, mask.q_len, 4, width), *[(2, mask.k_len, kv_heads, width)] * 2)
    return tuple(torch.randn(s, dtype=torch.float64, generator=generator).to(dtype) for s in shapes)


@given(mask=masks(), kv_heads=st.sampled_from([1, 2, 4]))
@settings(deadline=None, max_examples=100)
def test_every_mask_by_sdpa(mask: Mask, kv_heads: int) -> None:
    q, k, v = random_qkv(mask, kv_heads)
    expected = by_hand(q, k, v, mask)
    torch.testing.assert_close(by(q, k, v, mask), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@given(mask=masks(), kv_heads=st.sampled_from([1, 4]))
@settings(deadline=None, max_examples=15)
def test_every_mask_by_flex(mask: Mask, kv_heads: int) -> None:
    q, k, v = random_qkv(mask, kv_heads, 16, torch.float32)
    y = by(q, k, v, mask, "flex")
    torch.testing.assert_close(y, by_hand(q, k, v, mask), rtol=1e-4, atol=1e-4)


@given(mask=masks().filter(lambda mask: mask.kind != "memory"))
@settings(deadline=None, max_examples=40)
def test_every_mask_of_xformers_is_the_dense_one(mask: Mask) -> None:
    """Its rows are packed into one, each with a block of its own."""
    pytest.importorskip("xformers")
    rows = 2
    shape = (rows * mask.q_len, rows * mask.k_len)
    dense = mask.dense(CPU).expand(rows, mask.q_len, mask.k_len)
    bias = block_diagonal(mask, rows, CPU).materialize(shape, dtype=torch.float64)
    assert torch.equal(bias == 0, torch.block_diag(*dense).bool())


@given(total=st.integers(1, 40), window=st.integers(1, 12), seed=st.none() | st.integers(0, 9))
@settings(deadline=None, max_examples=60)
def test_a_window_in_blocks_is_the_window(total: int, window: int, seed: int | None) -> None:
    mask = causal(total, window=window, q_docs=None if seed is None else runs(total, seed))
    q, k, v = random_qkv(mask, 2)
    torch.testing.assert_close(by(q, k, v, mask), by_hand(q, k, v, mask), rtol=1e-12, atol=1e-12)


def test_a_window_needs_no_mask_of_all_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[int] = []
    dense = Mask.dense

    def watched(self: Mask, device: torch.device) -> torch.Tensor:
        built.append(self.q_len * self.k_len)
        return dense(self, device)

    monkeypatch.setattr(Mask, "dense", watched)
    mask = causal(512, window=8)
    q, k, v = random_qkv(mask, 2)
    by(q, k, v, mask)
    assert built == [8 * 16]  # one block and the one before it, for all blocks


def test_plain_masks_are_never_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(Mask, "dense")
    for mask in (causal(8), causal(1, 8), causal(8, 12), everything(3, 8)):
        q, k, v = random_qkv(mask, 2)
        by(q, k, v, mask)


# Choosing


def choose(wanted: str, config: ModelConfig, *, training: bool = True, documents: bool = False):
    return choose_backends(
        wanted,
        config,
        seq_len=32,
        document_mask=documents,
        device=CPU,
        dtype=torch.float32,
        training=training,
    )


def test_on_a_cpu_auto_is_sdpa_for_all() -> None:
    assert choose("auto", tiny_config(module_agg="stack", module_seq_len=8), documents=True) == {}


@pytest.mark.parametrize(
    ("wanted", "reason"),
    [
        ("xformers", "distributed.attn_impl=xformers: xformers has kernels for GPUs only"),
        ("flex", "distributed.attn_impl=flex: flex_attention has no backward pass on the CPU"),
    ],
)
def test_an_impossible_backend_is_refused_with_the_reason(wanted: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        choose(wanted, tiny_config())


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_works_on_a_cpu_where_nothing_is_learned() -> None:
    config = tiny_config(
        dim=32, module_agg="stack", module_seq_len=8, module_lookback=4, module_agg_dim=32
    )
    chosen = choose("flex", config, training=False, documents=True)
    assert chosen == dict.fromkeys(("documents", "memory"), "flex")
    chosen = choose("flex", config, training=False)
    assert chosen == dict.fromkeys(("plain", "causal", "memory"), "flex")


def test_kinds_that_never_come_up_are_not_asked_for() -> None:
    """One chunk: no site runs, nothing is looked back at."""
    config = tiny_config(module_agg="stack", module_seq_len=32, module_lookback=4)
    assert {mask.kind for mask, _ in attention._examples(config, 32, False)} == {"plain"}


@given(keys=model_keys(), window=st.none() | st.integers(1, 40), documents=st.booleans())
@settings(deadline=None, max_examples=40)
def test_the_trial_covers_every_mask_that_training_meets(
    keys: dict[str, Any], window: int | None, documents: bool
) -> None:
    """Kinds, windows and documents of the masks that a forward pass makes are all tried."""
    if window:
        keys |= {"module_seq_len": None, "sliding_window": window}
    model, length = tiny_model(**keys), 30
    met: list[Mask] = []

    class Watched(ReadyMask):
        def __init__(self, mask: Mask, *rest: Any) -> None:
            met.append(mask)
            super().__init__(mask, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("modular_lm.model.modular.ReadyMask", Watched)
        ids = some_documents(2, length) if documents else None
        model(some_tokens(2, length), documents=ids)
    tried = [mask for mask, _ in attention._examples(model.config, length, documents)]

    def traits(mask: Mask) -> tuple[Any, ...]:
        return mask.kind, mask.window is None, mask.q_docs is None, mask.is_square

    # A window as wide as the sample is none.
    assert {traits(m) for m in met if window is None or m.window is None or m.window < length} <= {
        traits(mask) for mask in tried
    }


def test_a_backend_that_computes_something_else_is_not_used(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    right = BACKENDS["sdpa"]
    wrong = Backend(right.form, lambda *args: 1.01 * right.attend(*args))
    monkeypatch.setitem(BACKENDS, "flex", wrong)
    with pytest.raises(ConfigError, match="flex computes something else"):
        choose("flex", tiny_config(), training=False)


def test_a_backend_that_fails_is_refused_with_what_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> torch.Tensor:
        raise RuntimeError("no kernel image")

    monkeypatch.setitem(BACKENDS, "flex", Backend(BACKENDS["sdpa"].form, broken))
    with pytest.raises(ConfigError, match="flex does not work here: no kernel image"):
        choose("flex", tiny_config(), training=False)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_within_compiled_layers() -> None:
    """Its block masks are made outside of the graphs, once for all layers."""
    model = tiny_model(
        torch.float32,
        dim=32,
        n_layers=2,
        module_agg="stack",
        module_agg_dim=32,
        module_seq_len=16,
        module_lookback=8,
    )
    tokens, documents = some_tokens(2, 40), some_documents(2, 40)
    with torch.no_grad():
        expected = model(tokens, documents=documents)
        model.backends = dict.fromkeys(("plain", "causal", "documents", "memory"), "flex")
        for unit in [*model.layers, *model.aggs]:
            unit.compile(backend="eager", fullgraph=True)
        found = model(tokens, documents=documents)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    torch._dynamo.reset()
