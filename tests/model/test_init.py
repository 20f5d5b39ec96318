from __future__ import annotations

import pytest
import torch

from modular_lm.model.init import init_weights
from modular_lm.model.lm import LanguageModel

from .tiny_models import MODES, tiny_config, tiny_model


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [n for n in one if not torch.equal(one[n], other[n])] == []


def test_the_trunk_is_the_same_in_every_mode_and_depth_of_modules() -> None:
    trunks = []
    for mode in MODES:
        for depth in (1, 2):
            model = tiny_model(torch.float32, reading=False, module_agg=mode, module_n_layers=depth)
            trunks.append({n: w for n, w in weights(model).items() if not n.startswith("aggs")})
    for trunk in trunks[1:]:
        assert_same(trunks[0], trunk)


def test_more_layers_shift_nothing() -> None:
    small, large = (
        weights(tiny_model(torch.float32, module_agg="drop", n_layers=n)) for n in (2, 4)
    )
    assert_same(small, {n: w for n, w in large.items() if n in small})


def test_seeds_and_names_give_different_weights() -> None:
    one = weights(tiny_model(torch.float32, module_agg="drop", seed=1))
    two = weights(tiny_model(torch.float32, module_agg="drop", seed=2))
    assert not torch.equal(one["output.weight"], two["output.weight"])
    assert not torch.equal(one["output.weight"], one["tok_embeddings.weight"])
    first, second = (one[f"layers.{i}.attention.wq.weight"] for i in (0, 1))
    assert not torch.equal(first, second)


def test_a_weight_has_these_values_for_ever() -> None:
    """Runs are compared across versions: a change here is a change of every experiment."""
    model = tiny_model(torch.float32, module_agg="drop", seed=42)
    found = model.layers[0].get_parameter("attention.wq.weight")[0, :3]
    expected = torch.tensor([0.018114792, -0.033178959, 0.022004962])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_built_on_meta_or_not_in_any_type(dtype: torch.dtype) -> None:
    plain = tiny_model(torch.float32, reading=False, module_agg="stack")
    with torch.device("meta"):
        model = LanguageModel(tiny_config(module_agg="stack")).to(dtype)
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, torch.nan)
    init_weights(model, seed=0)
    assert_same(weights(model), {n: w.to(dtype) for n, w in weights(plain).items()})


@pytest.mark.parametrize("base_std", [None, 0.02])
def test_standard_deviations(base_std: float | None) -> None:
    keys = {"dim": 128, "n_heads": 4, "module_agg": "stack", "init_base_std": base_std}
    model = tiny_model(torch.float32, reading=False, **keys)
    hidden = model.layers[0].get_parameter("feed_forward.w2.weight").shape[1]
    for name, weight in model.named_parameters():
        if name.endswith("norm.weight"):
            assert (weight == 1).all()
        elif name.startswith("aggs") and name.endswith("wo.weight"):
            assert (weight == 0).all()
        else:
            fan_in = hidden if name.endswith("w2.weight") else 128
            std = base_std or fan_in**-0.5
            # A normal cut at three deviations has 0.9866 of its standard deviation.
            assert weight.std().item() == pytest.approx(0.9866 * std, rel=0.06)
            assert abs(weight.mean().item()) < 0.05 * std
            assert weight.abs().max() <= 3 * std


def test_a_parameter_without_a_stated_start_is_refused() -> None:
    model = tiny_model(torch.float32, module_agg="drop")
    model.register_parameter("stray", torch.nn.Parameter(torch.ones(2)))
    with pytest.raises(ValueError, match="stray"):
        init_weights(model, seed=0)


def test_parameters_without_memory_are_refused() -> None:
    with torch.device("meta"):
        model = LanguageModel(tiny_config(module_agg="drop"))
    with pytest.raises(ValueError, match="to_empty"):
        init_weights(model, seed=0)
