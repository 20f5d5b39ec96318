"""Routing by evidence: the formula, its causality, and one result however tokens arrive."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modular_lm.errors import ConfigError
from modular_lm.model.lm import LanguageModel
from modular_lm.model.routing import (
    RoutedState,
    check_candidates,
    choose_routes,
    extend_routed,
    init_routed,
)

from .tiny_models import VOCAB, model_keys, some_tokens
from .tiny_models import tiny_model as plain_model

ALL = ("base", "code", "law")


def tiny_model(**keys: Any) -> LanguageModel:
    """With two columns; its logits are large, so that columns differ in what they expect."""
    model = plain_model(**({"module_seq_len": 4, "module_names": ["code", "law"]} | keys))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(1.5)
    return model


def in_pieces(
    model: LanguageModel, candidates: tuple[str, ...], tokens: torch.Tensor, cuts: list[int]
) -> tuple[torch.Tensor, RoutedState]:
    routed, outputs = init_routed(model, candidates, len(tokens)), []
    borders = sorted({0, tokens.shape[1], *(c for c in cuts if c < tokens.shape[1])})
    for start, end in itertools.pairwise(borders):
        logits, routed = extend_routed(model, candidates, tokens[:, start:end], routed)
        outputs.append(logits)
    return torch.cat(outputs, dim=1), routed


def evidence_by_hand(model: LanguageModel, tokens: torch.Tensor) -> tuple[list[int], list[float]]:
    """Of one row, with nothing but `forward`: routes of its chunks, evidence after the last.

    log p_c(chunk k) is read off whole sequences, whose chunks before k took the chosen routes.
    """
    length = model.config.module_seq_len
    assert length is not None
    evidence, routes = [0.0] * len(ALL), []
    for k in range(tokens.shape[1] // length):
        best = max(evidence)
        chosen = evidence.index(best)
        for number in range(len(ALL)):
            so_far = tokens[:, : (k + 1) * length]
            logits = model(so_far, routes=torch.tensor([[*routes, number]]))
            log_p = logits[0, k * length :].log_softmax(-1)
            chunk = so_far[0, k * length :]
            total = sum(log_p[i, int(chunk[i + 1])].item() for i in range(length - 1))
            evidence[number] = 0.3 * evidence[number] + total
        routes.append(chosen)
    return routes, evidence


@pytest.mark.parametrize("mode", ["drop", "avg", "stack"])
def test_evidence_is_what_the_formula_says(mode: str) -> None:
    model = tiny_model(module_agg=mode)
    seen = set()
    for seed in range(4):
        tokens = some_tokens(1, 20, seed)
        routes, evidence = evidence_by_hand(model, tokens)
        assert choose_routes(model, ALL, tokens).tolist() == [routes]
        _, routed = extend_routed(model, ALL, tokens, init_routed(model, ALL, 1))
        assert routed.evidence[0].tolist() == pytest.approx(evidence, rel=1e-12)
        seen |= set(routes)
    assert len(seen) > 1, "a test of routing must see several routes"


@given(
    keys=model_keys(lookback=False),
    length=st.integers(1, 16),
    cuts=st.lists(st.integers(1, 15), max_size=4),
    seed=st.integers(0, 99),
)
@settings(deadline=None, max_examples=15)
def test_any_split_equals_the_parallel_form(
    keys: dict[str, Any], length: int, cuts: list[int], seed: int
) -> None:
    model, tokens = tiny_model(**keys), some_tokens(3, length, seed)
    logits, routed = in_pieces(model, ALL, tokens, cuts)
    routes = choose_routes(model, ALL, tokens)
    expected = model(tokens, routes=routes)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-11)
    assert routed.state.t == (length,) * 3


def test_rows_of_a_batch_are_routed_one_by_one() -> None:
    model, tokens = tiny_model(module_agg="stack"), some_tokens(3, 18)
    routes = choose_routes(model, ALL, tokens)
    for row in range(3):
        assert torch.equal(choose_routes(model, ALL, tokens[row : row + 1])[0], routes[row])


@given(k=st.integers(0, 4), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=8)
def test_a_chunk_changes_neither_its_own_route_nor_anything_before(k: int, seed: int) -> None:
    model = tiny_model(module_agg="stack")
    tokens = some_tokens(2, 20, seed)
    other = tokens.clone()
    other[:, 4 * k : 4 * k + 4] = (other[:, 4 * k : 4 * k + 4] + 7) % VOCAB
    before, after = (choose_routes(model, ALL, t) for t in (tokens, other))
    assert torch.equal(before[:, : k + 1], after[:, : k + 1])
    # To the bit where tokens come one after the other; whole sequences run in other batches.
    left, right = (in_pieces(model, ALL, t, [])[0] for t in (tokens, other))
    assert torch.equal(left[:, : 4 * k], right[:, : 4 * k])
    left, right = model(tokens, routes=before), model(other, routes=after)
    torch.testing.assert_close(left[:, : 4 * k], right[:, : 4 * k], rtol=0, atol=1e-11)


def test_a_later_chunk_may_take_another_route() -> None:
    """Else the test above would show nothing."""
    model = tiny_model(module_agg="stack")
    found = [choose_routes(model, ALL, some_tokens(1, 20, seed)).tolist() for seed in range(6)]
    assert all(routes[0][0] == 0 for routes in found), "without evidence: the first candidate"
    assert len({str(routes) for routes in found}) > 1


@pytest.mark.parametrize("candidates", [("law",), ("code", "base"), ("base", "law")])
def test_only_candidates_are_chosen(candidates: tuple[str, ...]) -> None:
    model = tiny_model()
    routes = choose_routes(model, candidates, some_tokens(8, 24))
    allowed = {model.column_names.index(name) for name in candidates}
    assert set(routes.flatten().tolist()) == allowed
    assert routes[0, 0] == model.column_names.index(candidates[0])


def test_a_single_candidate_is_a_fixed_route() -> None:
    for lookback in (0, 2):
        model = tiny_model(module_lookback=lookback)
        tokens = some_tokens(2, 14)
        logits, _ = in_pieces(model, ("law",), tokens, [3, 9])
        expected, _ = model.extend(tokens, model.init_state(2), "law")
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-11)


def test_a_state_can_be_continued_in_several_ways() -> None:
    model, tokens = tiny_model(module_agg="stack"), some_tokens(2, 14)
    _, routed = in_pieces(model, ALL, tokens[:, :6], [])
    first, _ = extend_routed(model, ALL, tokens[:, 6:], routed)
    extend_routed(model, ALL, some_tokens(2, 9, seed=5), routed)
    again, _ = extend_routed(model, ALL, tokens[:, 6:], routed)
    assert torch.equal(first, again)


@pytest.mark.parametrize(
    ("keys", "candidates", "message"),
    [
        ({}, ("base", "prose"), "modules=base,prose: expected some of the columns of this model"),
        ({}, (), "modules=: expected some of the columns of this model: base, code, law"),
        ({}, ("law", "law"), "modules=law,law: names a column twice"),
        ({"module_seq_len": None}, ALL, "route=auto: needs chunks"),
        ({"module_lookback": 2}, ALL, "route=auto: is not possible with model.module_lookback=2"),
    ],
)
def test_candidates_that_cannot_be_are_refused(
    keys: dict[str, Any], candidates: tuple[str, ...], message: str
) -> None:
    model = tiny_model(**keys)
    for refused in (
        lambda: check_candidates(model, candidates),
        lambda: choose_routes(model, candidates, some_tokens(1, 8)),
    ):
        with pytest.raises(ConfigError) as caught:
            refused()
        assert str(caught.value).startswith(message)
