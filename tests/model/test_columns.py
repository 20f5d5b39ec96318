"""Columns beside the base: they leave it as it is, begin as asked, and mix chunk by chunk."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modular_lm.config import OptimConfig
from modular_lm.errors import ConfigError
from modular_lm.model.columns import begin_column, column_prefix, freeze, layers_of
from modular_lm.model.flops import parameters, trained_parameters
from modular_lm.model.lm import LanguageModel
from modular_lm.model.modular import State
from modular_lm.optim import build_optimizers

from .tiny_models import MODES, VOCAB, model_keys, some_documents, some_tokens, tiny_config
from .tiny_models import tiny_model as plain_model

NAMES = ["code", "law"]


def tiny_model(dtype: torch.dtype = torch.float64, **keys: Any) -> LanguageModel:
    """With two columns, all weights drawn."""
    columns: dict[str, Any] = {"module_names": NAMES}
    return plain_model(dtype, **(columns | keys))


def through(model: LanguageModel, route: str) -> LanguageModel:
    """The same weights, all chunks through one column."""
    config = dataclasses.replace(model.config, module_route=route)
    other = LanguageModel(config).to(model.tok_embeddings.weight.dtype)
    other.load_state_dict(model.state_dict())
    return other


def of_base(model: LanguageModel) -> dict[str, torch.Tensor]:
    """Everything that is in no column beside the base."""
    weights = model.state_dict()
    return {n: w.clone() for n, w in weights.items() if not n.startswith("columns.")}


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[n], right[n]) for n in left)


def train(model: LanguageModel, steps: int = 3) -> None:
    freeze(model, model.config)
    optimizers = build_optimizers(model, OptimConfig(weight_decay=0.5))
    optimizers.set_learning_rate(1e-2)
    for step in range(steps):
        tokens = some_tokens(2, 13, seed=step)
        model(tokens[:, :-1], tokens[:, 1:]).mean().backward()
        optimizers.step()
        optimizers.zero_grad()


# ------------------------------------------------------------------ the base


@given(keys=model_keys(), length=st.integers(1, 24))
@settings(deadline=None, max_examples=25)
def test_a_column_changes_no_bit_of_the_base(keys: dict[str, Any], length: int) -> None:
    alone = plain_model(torch.float32, **keys)
    grown = tiny_model(torch.float32, **keys)
    assert same(of_base(alone), of_base(grown)), "initial weights"
    tokens = some_tokens(2, length)
    assert torch.equal(grown(tokens), alone(tokens))
    if not keys["module_lookback"]:
        n_chunks = -(-length // keys["module_seq_len"])
        routes = torch.zeros(2, n_chunks, dtype=torch.int64)
        assert torch.equal(grown(tokens, routes=routes), alone(tokens))


@pytest.mark.parametrize("init", ["copy", "fresh"])
@pytest.mark.parametrize("mode", MODES)
def test_training_a_column_changes_no_bit_of_the_base(mode: str, init: Any) -> None:
    keys = {"module_agg": mode, "module_seq_len": 4, "module_lookback": 2}
    model = tiny_model(torch.float32, create_module_name="code", **keys)
    begin_column(model, "code", init)
    tokens = some_tokens(2, 14)
    base, weights = through(model, "base")(tokens), of_base(model)
    law = through(model, "law")(tokens)
    before = model(tokens)
    train(model)
    assert same(of_base(model), weights)
    assert torch.equal(through(model, "base")(tokens), base)
    assert torch.equal(through(model, "law")(tokens), law), "nor of another column"
    assert not torch.allclose(model(tokens), before, atol=1e-3)


# ------------------------------------------------------------------ how a column begins


@given(keys=model_keys(), length=st.integers(1, 24))
@settings(deadline=None, max_examples=15)
def test_a_copy_begins_as_the_base_to_the_bit(keys: dict[str, Any], length: int) -> None:
    model = tiny_model(torch.float32, **keys)
    tokens = some_tokens(2, length)
    assert not torch.equal(through(model, "code")(tokens), model(tokens))
    begin_column(model, "code", "copy")
    assert torch.equal(through(model, "code")(tokens), model(tokens))


@pytest.mark.parametrize("mode", MODES)
def test_a_fresh_column_does_nothing_at_first(mode: str) -> None:
    model = tiny_model(module_agg=mode, module_seq_len=4, module_route="code")
    drawn = model.get_parameter("columns.code.layers.1.attention.wq.weight").clone()
    begin_column(model, "code", "fresh")
    passed = []
    for block in layers_of(model, "code"):
        block.register_forward_hook(lambda _, args, out: passed.append((args[0], out[0])))
    logits = model(some_tokens(2, 14))
    assert len(passed) == 3
    assert all(torch.equal(before, after) for before, after in passed)
    if mode == "drop":
        embedded = model.tok_embeddings(some_tokens(2, 14))
        assert torch.equal(logits, model.get_submodule("output")(model.norm(embedded)))
    assert torch.equal(model.get_parameter("columns.code.layers.1.attention.wq.weight"), drawn)


@pytest.mark.parametrize("init", ["copy", "fresh"])
def test_a_new_column_learns_in_all_its_matrices(init: Any) -> None:
    model = tiny_model(module_seq_len=4, create_module_name="code")
    begin_column(model, "code", init)
    before = {n: p.clone() for n, p in layers_of(model, "code").named_parameters()}
    train(model)
    for name, parameter in layers_of(model, "code").named_parameters():
        assert not torch.equal(parameter, before[name]), name


# ------------------------------------------------------------------ routes


def decode(model: LanguageModel, tokens: torch.Tensor, routes: list[int]) -> torch.Tensor:
    """One row by the state machine, the column changing where a chunk begins."""
    state: State = model.init_state(1)
    outputs = []
    chunks = tokens.split(model.config.module_seq_len or 0, dim=1)
    for chunk, number in zip(chunks, routes, strict=True):
        for piece in chunk.split(3, dim=1):
            logits, state = model.extend(piece, state, model.column_names[number])
            outputs.append(logits)
    return torch.cat(outputs, dim=1)


@given(keys=model_keys(lookback=False), length=st.integers(1, 24), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=25)
def test_mixed_routes_equal_the_state_machine(keys: dict[str, Any], length: int, seed: int) -> None:
    model = tiny_model(**keys)
    tokens = some_tokens(3, length)
    n_chunks = -(-length // keys["module_seq_len"])
    generator = torch.Generator().manual_seed(seed)
    routes = torch.randint(3, (3, n_chunks), generator=generator)
    logits = model(tokens, routes=routes)
    for row in range(3):
        alone = decode(model, tokens[row : row + 1], routes[row].tolist())
        torch.testing.assert_close(logits[row : row + 1], alone, rtol=0, atol=1e-11)


@given(keys=model_keys(lookback=False), length=st.integers(1, 24))
@settings(deadline=None, max_examples=15)
def test_one_route_for_all_is_that_column_also_with_documents(
    keys: dict[str, Any], length: int
) -> None:
    model = tiny_model(**keys)
    tokens, documents = some_tokens(2, length), some_documents(2, length)
    routes = torch.full((2, -(-length // keys["module_seq_len"])), 2)
    expected = through(model, "law")(tokens, documents=documents)
    found = model(tokens, documents=documents, routes=routes)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-11)


def test_documents_stay_apart_under_mixed_routes() -> None:
    """Chunk by chunk: the mask of a row must go where its row goes."""
    model = tiny_model(module_agg="stack", module_seq_len=4)
    tokens, documents = some_tokens(2, 14), some_documents(2, 14)
    routes = torch.tensor([[0, 2, 1, 0], [1, 0, 0, 2]])
    touched = documents == documents[:, 5:6]
    other = torch.where(touched, (tokens + 1) % VOCAB, tokens)
    before, after = (model(t, documents=documents, routes=routes) for t in (tokens, other))
    assert torch.equal(before[~touched], after[~touched])
    assert not torch.equal(before[touched], after[touched])


def test_every_column_takes_part_in_mixed_routes() -> None:
    """Ranks whose chunks need other columns must not miss each other: all columns run, and get
    gradients, of zero where no chunk came through."""
    model = tiny_model(module_agg="avg", module_seq_len=4)
    tokens = some_tokens(1, 8)
    model(tokens, tokens, routes=torch.tensor([[0, 1]])).sum().backward()
    for name in model.column_names:
        gradients = [p.grad for p in layers_of(model, name).parameters()]
        assert all(g is not None for g in gradients), name
        assert any(bool((g != 0).any()) for g in gradients if g is not None) is (name != "law")


def test_routes_that_fit_no_chunk_or_no_column_are_errors() -> None:
    model, tokens = tiny_model(module_seq_len=4), some_tokens(2, 8)
    for routes in (torch.zeros(2, 3), torch.zeros(1, 2), torch.full((2, 2), 3)):
        with pytest.raises(AssertionError):
            model(tokens, routes=routes.long())


def test_look_back_and_mixed_routes_are_refused() -> None:
    model = tiny_model(module_seq_len=4, module_lookback=2)
    with pytest.raises(AssertionError, match="look back"):
        model(some_tokens(1, 8), routes=torch.tensor([[0, 1]]))


# ------------------------------------------------------------------ what learns


@pytest.mark.parametrize(
    ("keys", "learning"),
    [
        ({}, {"bus", "base"}),
        ({"module_train": "new"}, {"base"}),
        ({"create_module_name": "new"}, {"new"}),
        ({"create_module_name": "new", "module_train": "all"}, {"bus", "new"}),
        ({"module_route": "code"}, {"code"}),
        ({"module_route": "code", "module_train": "all"}, {"bus", "code"}),
    ],
)
def test_gradients_go_where_module_train_says(keys: dict[str, Any], learning: set[str]) -> None:
    model = tiny_model(module_seq_len=4, module_agg="stack", module_names=["code", "codes"], **keys)
    freeze(model, model.config)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained_parameters(model.config) == trained
    tokens = some_tokens(2, 8)
    model(tokens, tokens).sum().backward()
    found: dict[str, set[bool]] = {}
    for name, parameter in model.named_parameters():
        owners = [c for c in model.column_names if name.startswith(column_prefix(c))]
        owner = owners[0] if owners else "bus"
        found.setdefault(owner, set()).add(parameter.grad is not None)
    assert {owner for owner, gets in found.items() if gets == {True}} == learning
    assert all(len(gets) == 1 for gets in found.values())


def test_all_may_be_trained_after_a_column_was() -> None:
    model = tiny_model(module_route="code")
    freeze(model, model.config)
    freeze(model, dataclasses.replace(model.config, module_route="base", module_train="all"))
    assert model.tok_embeddings.weight.requires_grad
    assert not model.get_parameter("columns.code.layers.0.ffn_norm.weight").requires_grad


# ------------------------------------------------------------------ sizes and names


@given(keys=model_keys(), n=st.integers(0, 3))
@settings(deadline=None, max_examples=20)
def test_parameters_count_columns(keys: dict[str, Any], n: int) -> None:
    config = tiny_config(module_names=[f"c{i}" for i in range(n)], **keys)
    with torch.device("meta"):
        shapes = {name: p.numel() for name, p in LanguageModel(config).named_parameters()}
    found = parameters(config)
    assert found.columns == sum(v for name, v in shapes.items() if name.startswith("columns."))
    assert found.total == sum(shapes.values())
    assert found.matmul == parameters(tiny_config(**keys)).matmul, "one column runs at a time"


def test_what_columns_resolve_to() -> None:
    def resolved(**keys: Any) -> tuple[list[str], str | None, str | None]:
        c = tiny_config(**keys)
        return c.module_names, c.module_route, c.module_train

    assert resolved() == ([], "base", "all")
    assert resolved(module_names=NAMES) == (NAMES, "base", "all")
    assert resolved(module_names=NAMES, module_route="law") == (NAMES, "law", "new")
    added = ([*NAMES, "new"], "new", "new")
    assert resolved(module_names=NAMES, create_module_name="new") == added
    # Resolved once more, as when a run is continued.
    assert resolved(module_names=added[0], create_module_name="new", module_route="new") == added
    assert resolved(create_module_name="new", module_train="all") == (["new"], "new", "all")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"create_module_name": "base"},
            "model.create_module_name=base: PyTorch or the jobs",
        ),
        (
            {"create_module_name": "auto"},
            "model.create_module_name=auto: PyTorch or the jobs",
        ),
        ({"create_module_name": "a.b"}, "model.create_module_name=a.b: expected a name of letters"),
        ({"create_module_name": ""}, "model.create_module_name=: expected a name of letters"),
        ({"create_module_name": "-a"}, "model.create_module_name=-a: expected a name of letters"),
        ({"module_names": ["a", "a"]}, "model.module_names=a: there is such a column already"),
        ({"module_names": ["a/b"]}, "model.module_names=a/b: expected a name of letters"),
        ({"module_route": "law"}, "model.module_route=law: expected a column: base"),
        ({"module_route": "auto"}, "model.module_route=auto: training runs all chunks through one"),
        (
            {"create_module_name": "law", "module_route": "base"},
            "model.module_route=base: the new column is trained",
        ),
    ],
)
def test_names_that_cannot_be_are_refused(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        tiny_config(**keys)
    assert str(caught.value).startswith(message)
