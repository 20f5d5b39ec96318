"""A column added to a whole model: nothing else changes; means are exact."""

from __future__ import annotations

import pytest
import torch

from modular_lm.model.columns import begin_column, layers_of
from modular_lm.model.growth import fill_column, mean_of, with_column

from .tiny_models import some_tokens, tiny_model


def test_a_column_is_added_beside_all_that_was_there() -> None:
    model = tiny_model(torch.float32, seed=4, module_agg="stack", module_names=["code"])
    grown = with_column(model, "law", seed=9)
    assert grown.column_names == ("base", "code", "law")
    assert model.column_names == ("base", "code"), "the model itself stays as it is"
    before, after = model.state_dict(), grown.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)
    new = {name for name in after if name.startswith("columns.law.")}
    assert after.keys() - before.keys() == new
    drawn = tiny_model(torch.float32, seed=9, module_agg="stack", module_names=["law"])
    assert all(torch.equal(after[name], drawn.state_dict()[name]) for name in new)
    assert torch.equal(grown(some_tokens(2, 12)), model(some_tokens(2, 12)))


@pytest.mark.parametrize("names", [["base", "code"], ["code", "law"], ["law", "base", "code"]])
def test_the_mean_of_columns(names: list[str]) -> None:
    model = tiny_model(module_names=["code", "law"])
    found = mean_of(model, names)
    assert found.keys() == dict(layers_of(model, "base").named_parameters()).keys()
    for key, tensor in found.items():
        expected = sum(layers_of(model, name).get_parameter(key) for name in names) / len(names)
        torch.testing.assert_close(tensor, expected, rtol=0, atol=1e-15)
        assert not tensor.requires_grad
    grown = with_column(model, "mean", seed=0)
    fill_column(grown, "mean", found)
    for key, tensor in found.items():
        assert torch.equal(layers_of(grown, "mean").get_parameter(key), tensor)


def test_the_mean_of_equals_is_the_same() -> None:
    model = tiny_model(torch.float32, module_names=["code"])
    begin_column(model, "code", "copy")
    found = mean_of(model, ["base", "code"])
    assert all(torch.equal(found[key], p) for key, p in layers_of(model, "base").named_parameters())
