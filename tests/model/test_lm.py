from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from modular_lm.config.checks import resolve_model
from modular_lm.config.schema import ModelConfig
from modular_lm.model import lm
from modular_lm.model.attention import ReadyMask
from modular_lm.model.layers import make_rope
from modular_lm.model.lm import IGNORE, LanguageModel
from modular_lm.model.masks import causal
from modular_lm.model.mixers import Segments

from .tiny_models import MODES, READING_MODES, VOCAB, some_tokens, tiny_config, tiny_model


def test_the_loss_is_the_cross_entropy_of_each_target() -> None:
    model = tiny_model(module_agg="avg", module_seq_len=4)
    tokens, targets = some_tokens(2, 10), some_tokens(2, 10, seed=1)
    targets[0, 3] = targets[1, :] = IGNORE
    losses = model(tokens, targets)
    assert losses.shape == (2, 10)
    scored = targets != IGNORE
    chosen = model(tokens).log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    torch.testing.assert_close(losses[scored], -chosen[scored])
    assert (losses[~scored] == 0).all()


def test_ignored_targets_give_no_gradient() -> None:
    model = tiny_model(module_agg="drop")
    model(some_tokens(1, 6), torch.full((1, 6), IGNORE)).sum().backward()
    assert all(p.grad is not None and (p.grad == 0).all() for p in model.parameters())


@pytest.mark.parametrize("tying", [False, True])
def test_sliced_losses_and_gradients_are_those_of_the_whole(
    monkeypatch: pytest.MonkeyPatch, tying: bool
) -> None:
    tokens, targets = some_tokens(2, 10), some_tokens(2, 10, seed=1)

    def run() -> tuple[torch.Tensor, list[torch.Tensor | None]]:
        model = tiny_model(module_agg="stack", module_seq_len=4, weight_tying=tying)
        losses = model(tokens, targets)
        losses.sum().backward()
        return losses, [p.grad for p in model.parameters()]

    losses, gradients = run()
    calls = []
    monkeypatch.setattr(lm, "LOGITS_AT_ONCE", 7 * VOCAB)
    one_slice = LanguageModel._slice_losses

    def counting(self: Any, h: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        calls.append(len(h))
        return one_slice(self, h, targets)

    monkeypatch.setattr(LanguageModel, "_slice_losses", counting)
    sliced, sliced_gradients = run()
    assert sorted(calls) == [6, 6, 7, 7, 7, 7]  # each once more in the backward pass
    torch.testing.assert_close(sliced, losses)
    torch.testing.assert_close(sliced_gradients, gradients)


def test_a_tied_head_is_the_embedding() -> None:
    model = tiny_model(weight_tying=True, module_agg="drop", n_layers=1)
    assert model.output is None
    tokens = some_tokens(1, 5) % (VOCAB - 1)
    before = model(tokens)
    with torch.no_grad():
        model.tok_embeddings.weight[VOCAB - 1] *= 2
    column = model(tokens)[..., VOCAB - 1]
    torch.testing.assert_close(column, 2 * before[..., VOCAB - 1])


@pytest.mark.parametrize("mode", MODES)
def test_bf16_parameters_give_about_the_loss_of_fp32(mode: str) -> None:
    keys = {"module_agg": mode, "module_seq_len": 8}
    tokens, targets = some_tokens(4, 30), some_tokens(4, 30, seed=1)
    exact = tiny_model(torch.float32, **keys)(tokens, targets)
    losses = tiny_model(torch.bfloat16, **keys)(tokens, targets)
    assert losses.dtype == torch.float32
    assert (losses - exact).abs().mean() < 0.05


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_trains(mode: str) -> None:
    model = tiny_model(torch.float32, reading=False, module_agg=mode, module_seq_len=4)
    batch = some_tokens(4, 17)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        loss = model(batch[:, :-1], batch[:, 1:]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2


def recalled(mode: str) -> float:
    """Mean loss, after some training, of a token that only the chunk before tells."""
    model = tiny_model(torch.float32, reading=False, module_agg=mode, module_seq_len=4, n_layers=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(0)
    loss = torch.tensor(0.0)
    for _ in range(150):
        tokens = torch.randint(8, (32, 5), generator=generator)
        tokens[:, 4] = 8  # "what was the first token?", at the start of the second chunk
        loss = F.cross_entropy(model(tokens)[:, 4], tokens[:, 0])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


@pytest.mark.parametrize("mode", READING_MODES)
def test_a_site_learns_to_carry_a_token_into_the_next_chunk(mode: str) -> None:
    assert recalled(mode) < 0.3


def test_with_drop_nothing_is_carried() -> None:
    assert recalled("drop") > 1.9  # ln 8 = 2.08


# Golden numbers of a published model


@pytest.fixture(scope="module")
def stories(shared_data: Path) -> Path:
    return shared_data / "golden" / "stories260K"


def load_stories(folder: Path, **keys: Any) -> LanguageModel:
    params = json.loads((folder / "meta" / "params.json").read_text())
    names = ("dim", "n_layers", "n_heads", "n_kv_heads", "multiple_of", "norm_eps", "rope_theta")
    config = ModelConfig(**{n: params[n] for n in names}, weight_tying=True, **keys)
    model = LanguageModel(resolve_model(config, params["max_seq_len"], params["vocab_size"]))
    for agg in model.aggs:
        torch.nn.init.normal_(agg.get_parameter("wo.weight"))
    file = folder / "meta" / "consolidated.00.pth"
    weights = torch.load(file, map_location="cpu", weights_only=True)
    assert torch.equal(weights.pop("output.weight"), weights["tok_embeddings.weight"])
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert unexpected == []
    assert all(name.startswith("aggs.") for name in missing)
    return model


def test_logits_of_stories260k(stories: Path) -> None:
    golden = np.load(stories / "golden_logits.npz")
    tokens = torch.from_numpy(golden["tokens"])[None]
    expected = torch.from_numpy(golden["logits_f64"])
    model = load_stories(stories, module_agg="drop")
    with torch.no_grad():
        torch.testing.assert_close(model(tokens)[0].double(), expected, rtol=0, atol=1e-4)
        exact = model.double()(tokens)[0]
    torch.testing.assert_close(exact, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("mode", MODES)
def test_stories260k_modularised_with_one_chunk_has_the_same_bits(stories: Path, mode: str) -> None:
    tokens = torch.from_numpy(np.load(stories / "golden_logits.npz")["tokens"])[None]
    expected = load_stories(stories, module_agg="drop")(tokens)
    for length in (64, 512):
        model = load_stories(stories, module_agg=mode, module_seq_len=length)
        assert torch.equal(model(tokens), expected)


# Compilation


@pytest.mark.parametrize(
    "keys", [{"module_seq_len": 4}, {"module_seq_len": 4, "module_lookback": 2}]
)
def test_layers_and_sites_compile_whole_and_once(keys: dict[str, Any]) -> None:
    """Per unit, as training does it: no graph break, and no new graph for the next batch."""
    import torch._dynamo.testing as dynamo

    counter = dynamo.CompileCounter()
    model = tiny_model(torch.float32, module_agg="stack", n_layers=2, **keys)
    tokens = some_tokens(2, 12)
    expected = model(tokens)
    torch._dynamo.reset()
    for unit in [*model.layers, *model.aggs]:
        unit.compile(backend=counter, fullgraph=True)
    torch.testing.assert_close(model(tokens), expected)
    graphs = counter.frame_count
    model(some_tokens(2, 12, seed=1))
    assert counter.frame_count == graphs
    torch._dynamo.reset()


def test_fsdp_does_not_cast_the_rotations_in_segments() -> None:
    """It casts the tensors that it finds in the inputs of a layer, within dataclasses too."""
    from torch.distributed.utils import _apply_to_tensors

    rope = make_rope(torch.arange(4), 8, 10000.0, torch.float32)
    mask = ReadyMask(causal(4, 6), 1, torch.device("cpu"))
    cast = _apply_to_tensors(lambda x: x.bfloat16(), Segments(rope, mask, back=rope))
    for kept in (cast.rope, cast.back):
        assert kept.cos.dtype == kept.sin.dtype == torch.float32


def test_a_model_is_built_on_meta_with_its_parameters_only() -> None:
    with torch.device("meta"):
        model = LanguageModel(tiny_config(module_agg="avg", module_seq_len=4))
    assert all(p.is_meta for p in model.parameters())
    model(torch.zeros(2, 10, dtype=torch.int64, device="meta"))
