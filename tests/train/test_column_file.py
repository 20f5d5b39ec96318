"""A column as a file: it comes back to the bit, on its own base only, and never damaged."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modular_lm.errors import CheckpointError, RunFailedError
from modular_lm.model.columns import begin_column, layers_of
from modular_lm.model.lm import LanguageModel
from modular_lm.train.column_file import base_hash, column_hash, read_column, write_column
from tests.model.tiny_models import tiny_model


def model_with(*names: str, **keys: Any) -> LanguageModel:
    return tiny_model(torch.float32, module_agg="stack", module_names=list(names), **keys)


def test_a_column_comes_back_to_the_bit(tmp_path: Path) -> None:
    model = model_with("code", "law")
    write_column(model, "code", tmp_path / "new" / "code.pt")
    values = torch.load(tmp_path / "new" / "code.pt", weights_only=True)
    expected = {"format", "name", "config", "base_hash", "weights", "digest"}
    assert values.keys() == expected
    assert [p.name for p in tmp_path.rglob("*")] == ["new", "code.pt"]
    # Another model of the same base, with other columns.
    column = read_column(tmp_path / "new" / "code.pt", model_with("other"))
    assert column.name == "code"
    assert column.base_hash == base_hash(model)
    weights = dict(layers_of(model, "code").named_parameters())
    assert column.weights.keys() == weights.keys()
    assert all(torch.equal(column.weights[key], p) for key, p in weights.items())


def test_what_the_hash_of_the_base_depends_on() -> None:
    model = model_with("code")
    expected = base_hash(model)
    assert base_hash(model_with()) == expected, "not on columns"
    assert base_hash(model_with("law", seed=0)) == expected
    assert base_hash(model_with(seed=1)) != expected
    for name in (
        "tok_embeddings.weight",
        "norm.weight",
        "output.weight",
        "layers.2.ffn_norm.weight",
    ):
        other = model_with("code")
        with torch.no_grad():
            other.get_parameter(name).flatten()[-1].add_(1e-6)
        assert base_hash(other) != expected, name
    sites = model_with("code")
    with torch.no_grad():
        next(sites.aggs.parameters()).flatten()[0].add_(1e-6)
    assert base_hash(sites) != expected
    before = column_hash(model, "code")
    assert before != column_hash(model, "base")
    begin_column(model, "code", "copy")
    assert column_hash(model, "code") == column_hash(model, "base")
    assert base_hash(model) == expected


def test_the_hashes_are_the_same_tomorrow() -> None:
    """Files of last year must fit: the way of hashing may not change."""
    model = model_with("code")
    with torch.no_grad():
        for number, (_, parameter) in enumerate(sorted(model.named_parameters())):
            parameter.copy_(torch.arange(parameter.numel()).view_as(parameter) + number)
    expected = "fdb38a2e3f88", "ee7bef21801d"
    assert (base_hash(model)[:12], column_hash(model, "code")[:12]) == expected


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (
            {"seed": 1},
            r"code\.pt: the column code belongs to the base (\w{12}), .*base is (\w{12})",
        ),
        ({"dim": 32}, r"belongs to the base"),
        ({"module_agg": "drop"}, r"belongs to the base"),
        ({"module_agg": "sum"}, r"of another model: module_agg: avg there, sum here$"),
        ({"rope_theta": 5e5}, r"of another model: rope_theta: 10000\.0 there, 500000\.0 here$"),
        ({"n_heads": 4, "module_agg_dim": 8}, r"n_heads: 2 there, 4 here; n_kv_heads"),
    ],
)
def test_another_base_is_refused(tmp_path: Path, other: dict[str, Any], message: str) -> None:
    model = tiny_model(torch.float32, module_names=["code"], module_agg="avg")
    write_column(model, "code", tmp_path / "code.pt")
    keys: dict[str, Any] = {"module_agg": "avg"}
    stranger = tiny_model(torch.float32, **(keys | other))
    with pytest.raises(CheckpointError, match=message) as caught:
        read_column(tmp_path / "code.pt", stranger)
    assert "\n" not in str(caught.value)
    if other == {"seed": 1}:
        assert base_hash(model)[:12] in str(caught.value)
        assert base_hash(stranger)[:12] in str(caught.value)
        assert "train a new column" in str(caught.value)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[LanguageModel, bytes, Path]:
    model, file = model_with("code"), tmp_path_factory.mktemp("files") / "code.pt"
    write_column(model, "code", file)
    return model, file.read_bytes(), file


@given(data=st.data())
@settings(deadline=None, max_examples=60)
def test_no_damage_comes_through(
    written: tuple[LanguageModel, bytes, Path], data: st.DataObject
) -> None:
    """A byte that matters is noticed; of those that do not, the weights are the same."""
    model, content, file = written
    damaged = bytearray(content)
    damaged[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    file.write_bytes(damaged)
    told = None
    try:
        column = read_column(file, model)
    except CheckpointError as error:
        told = str(error)
    else:
        for key, parameter in layers_of(model, "code").named_parameters():
            assert torch.equal(column.weights[key], parameter)
    assert told is None or (told.startswith(f"{file}: ") and "\n" not in told)


def change(**values: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda whole: whole | values


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda whole: [1], "expected a dict"),
        (lambda whole: whole["weights"], "is not a column written by"),
        (change(format="modular_lm"), "is not a column written by"),
        (change(more=1), "is not a column written by"),
        (change(name="law"), "damaged"),
        (change(name=3), "damaged"),
        (change(base_hash=None), "damaged"),
        (change(config=[]), "damaged"),
        (change(weights={}), "damaged"),
        (change(weights={"a": 1}), "damaged"),
        (change(weights=None), "damaged"),
    ],
)
def test_files_that_are_something_else_are_refused(
    tmp_path: Path, damage: Callable[[dict[str, Any]], Any], message: str
) -> None:
    model, file = model_with("code"), tmp_path / "code.pt"
    write_column(model, "code", file)
    torch.save(damage(torch.load(file, weights_only=True)), file)
    with pytest.raises(CheckpointError, match=message):
        read_column(file, model)


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    model, file = model_with("code"), tmp_path / "code.pt"
    write_column(model, "code", file)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="not readable as a torch file"):
        read_column(file, model)


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(RunFailedError, match=r"/code\.pt: No space left on device; free some"):
        write_column(model_with("code"), "code", tmp_path / "code.pt")
    assert list(tmp_path.iterdir()) == []
