"""Reading tokens in pieces, in one batch or many: the same logits as the parallel form."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modular_lm.model.flops import state_elements
from modular_lm.model.lm import LanguageModel
from modular_lm.model.modular import State

from .tiny_models import MODES, assert_equal_in_fp64, model_keys, some_tokens, tiny_model


def extend_in_pieces(
    model: LanguageModel, tokens: torch.Tensor, borders: list[int]
) -> tuple[torch.Tensor, State]:
    state, outputs = model.init_state(tokens.shape[0]), []
    for start, end in itertools.pairwise(borders):
        logits, state = model.extend(tokens[:, start:end], state)
        outputs.append(logits)
    return torch.cat(outputs, dim=1), state


@given(
    keys=model_keys(),
    chunked=st.integers(0, 4),
    window=st.none() | st.integers(1, 9),
    length=st.integers(1, 30),
    cuts=st.lists(st.integers(1, 29), max_size=6),
)
@settings(deadline=None, max_examples=80)
def test_any_split_of_the_input_gives_the_parallel_logits(
    keys: dict[str, Any], chunked: int, window: int | None, length: int, cuts: list[int]
) -> None:
    if not chunked:
        keys |= {"module_seq_len": None, "sliding_window": window}
    model = tiny_model(**keys)
    tokens = some_tokens(2, length)
    borders = sorted({0, length, *(c for c in cuts if c < length)})
    logits, state = extend_in_pieces(model, tokens, borders)
    assert_equal_in_fp64(logits, model(tokens))
    assert state.t == (length, length)


@given(
    keys=model_keys(),
    chunked=st.integers(0, 4),
    window=st.none() | st.integers(1, 9),
    read=st.lists(st.integers(0, 14), min_size=2, max_size=3),
    more=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    data=st.data(),
)
@settings(deadline=None, max_examples=50)
def test_rows_at_different_positions_are_as_if_alone(
    keys: dict[str, Any],
    chunked: int,
    window: int | None,
    read: list[int],
    more: list[int],
    data: st.DataObject,
) -> None:
    """Each row reads a prompt of its own length; joined, all go on together; one leaves."""
    if not chunked:
        keys |= {"module_seq_len": None, "sliding_window": window}
    model = tiny_model(**keys)
    tokens = some_tokens(len(read), max(read) + sum(more))
    states = []
    for row, n in enumerate(read):
        state = model.init_state(1)
        if n:
            _, state = model.extend(tokens[row : row + 1, :n], state)
        states.append(state)
    state, rows = State.join(states), list(range(len(read)))
    for n in more:
        piece = torch.cat([tokens[r : r + 1, read[r] : read[r] + n] for r in rows])
        logits, state = model.extend(piece, state)
        for at, row in enumerate(rows):
            expected = model(tokens[row : row + 1, : read[row] + n])[:, -n:]
            assert_equal_in_fp64(logits[at : at + 1], expected)
        read = [r + n for r in read]
        if len(rows) > 1 and data.draw(st.booleans()):
            order = data.draw(st.permutations(range(len(rows))))[:-1]
            state, rows = state.select(order), [rows[i] for i in order]
    assert state.t == tuple(read[row] for row in rows)


@pytest.mark.parametrize("mode", MODES)
def test_a_row_goes_on_alone_when_a_longer_one_has_left(mode: str) -> None:
    """What the longer one needed in the memory of both must not shift what comes next."""
    model = tiny_model(module_agg=mode, module_seq_len=2)
    tokens = some_tokens(2, 12)
    _, short = model.extend(tokens[:1, :2], model.init_state(1))
    _, long = model.extend(tokens[1:, :6], model.init_state(1))
    alone = State.join([short, long]).select([0])
    logits, _ = model.extend(tokens[:1, 2:], alone)
    assert_equal_in_fp64(logits, model(tokens[:1])[:, 2:])


@pytest.mark.parametrize("mode", MODES)
def test_one_token_at_a_time(mode: str) -> None:
    model = tiny_model(module_agg=mode, module_seq_len=4, module_n_summary=2)
    tokens = some_tokens(2, 19)
    logits, _ = extend_in_pieces(model, tokens, list(range(20)))
    assert_equal_in_fp64(logits, model(tokens))


@pytest.mark.parametrize("mode", MODES)
def test_a_state_is_a_value_that_can_be_continued_twice(mode: str) -> None:
    model = tiny_model(module_agg=mode, module_seq_len=4)
    tokens = some_tokens(1, 11)
    _, state = model.extend(tokens[:, :7], model.init_state(1))
    model.extend(some_tokens(1, 9, seed=5), state)
    logits, _ = model.extend(tokens[:, 7:], state)
    assert_equal_in_fp64(logits, model(tokens)[:, 7:])


def elements(state: State) -> int:
    caches = [x for cache in state.layers for x in (cache.k, cache.v)]
    sites = [x for site in state.sites for x in (site.pooled, *site.memory)]
    return sum(x.numel() for x in caches + sites)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("chunk", "lookback", "window"), [(4, 0, None), (4, 3, None), (None, 0, None), (None, 0, 5)]
)
def test_the_state_has_the_stated_size_and_caches_end_with_the_chunk(
    mode: str, chunk: int | None, lookback: int, window: int | None
) -> None:
    model = tiny_model(
        module_agg=mode,
        module_seq_len=chunk,
        module_lookback=lookback,
        sliding_window=window,
        module_n_summary=2,
        module_agg_dim=8,
        n_kv_heads=1,
    )
    state, fullest = model.init_state(1), 0
    tokens = some_tokens(1, 18)
    for t in range(1, 19):
        _, state = model.extend(tokens[:, t - 1 : t], state)
        fullest = max(fullest, elements(state))
        bound = state_elements(model.config, t)
        if chunk is None or t <= chunk or t % chunk == 0:
            assert elements(state) == bound
        assert elements(state) <= fullest <= bound
        assert max(cache.k.shape[1] for cache in state.layers) <= (chunk or t) + lookback


def test_sums_are_kept_in_fp32_beside_a_bf16_cache() -> None:
    model = tiny_model(torch.bfloat16, module_agg="avg", module_seq_len=4)
    _, state = model.extend(some_tokens(1, 6), model.init_state(1))
    assert {cache.k.dtype for cache in state.layers} == {torch.bfloat16}
    assert {x.dtype for s in state.sites for x in (s.pooled, *s.memory)} == {torch.float32}
