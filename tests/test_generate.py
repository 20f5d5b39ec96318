from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modular_lm.config.checks import resolve_model
from modular_lm.config.schema import ModelConfig
from modular_lm.errors import ConfigError
from modular_lm.generate import generate, sample
from modular_lm.model.init import init_weights
from modular_lm.model.lm import LanguageModel
from modular_lm.model.routing import choose_routes

PROMPT = [5, 1, 7, 7, 2, 9, 3]


def small_model(**keys: Any) -> LanguageModel:
    defaults: dict[str, Any] = {"dim": 16, "n_layers": 2, "n_heads": 2, "multiple_of": 8}
    config = resolve_model(ModelConfig(**(defaults | keys)), seq_len=16, vocab_size=30)
    model = LanguageModel(config).double()
    init_weights(model, seed=3)
    for agg in model.aggs:
        generator = torch.Generator().manual_seed(0)
        torch.nn.init.normal_(agg.get_parameter("wo.weight"), generator=generator)
    return model


@pytest.mark.parametrize("mode", ["drop", "avg", "sum", "stack"])
@pytest.mark.parametrize("chunk", [4, None])
def test_greedy_is_the_argmax_of_the_full_forward_at_each_step(
    mode: str, chunk: int | None
) -> None:
    model = small_model(module_agg=mode, module_seq_len=chunk)
    tokens = list(PROMPT)
    for _ in range(12):
        tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
    assert generate(model, [PROMPT], max_tokens=12) == [tokens[len(PROMPT) :]]


def test_long_prompts_are_read_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model(module_agg="stack", module_seq_len=4)
    whole = generate(model, [PROMPT], max_tokens=5)
    monkeypatch.setattr("modular_lm.generate._PREFILL", 3)
    assert generate(model, [PROMPT], max_tokens=5) == whole


def test_ends_with_eos_or_at_max_tokens() -> None:
    model = small_model(module_agg="avg", module_seq_len=4)
    (free,) = generate(model, [PROMPT], max_tokens=10, temperature=1.0, seed=1)
    assert len(free) == 10
    eos = free[4]
    (stopped,) = generate(model, [PROMPT], max_tokens=10, temperature=1.0, seed=1, eos_id=eos)
    assert stopped == free[: free.index(eos) + 1]
    assert generate(model, [PROMPT], max_tokens=0) == [[]]


def test_seeds_decide_the_sample() -> None:
    model = small_model(module_agg="avg", module_seq_len=4)
    runs = [generate(model, [PROMPT], max_tokens=20, temperature=1.0, seed=s) for s in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(ConfigError, match="BOS"):
        generate(small_model(), [PROMPT, []], max_tokens=3)


@pytest.mark.parametrize("mode", ["drop", "avg", "stack"])
@pytest.mark.parametrize("keys", [{"module_seq_len": 4, "module_lookback": 2}, {}])
def test_prompts_of_any_length_go_on_together_as_if_alone(mode: str, keys: dict[str, Any]) -> None:
    model = small_model(module_agg=mode, **keys)
    prompts = [PROMPT, PROMPT[:2], [8] * 9, PROMPT[3:]]
    options: dict[str, Any] = {"max_tokens": 12, "temperature": 1.0}
    alone = [generate(model, [p], seed=7 + row, **options)[0] for row, p in enumerate(prompts)]
    assert generate(model, prompts, seed=7, **options) == alone
    # Rows that end leave the others as they are.
    eos = alone[1][3]
    ended = [row[: row.index(eos) + 1] if eos in row else row for row in alone]
    assert generate(model, prompts, seed=7, eos_id=eos, **options) == ended


def test_columns_are_run_as_routed() -> None:
    model = small_model(module_agg="avg", module_seq_len=4, module_names=["code"])
    base, code = (generate(model, [PROMPT], max_tokens=8, route=r)[0] for r in ("base", "code"))
    assert base != code
    assert generate(model, [PROMPT], max_tokens=8)[0] == base
    only_code = generate(model, [PROMPT, PROMPT], max_tokens=8, candidates=["code"])
    assert only_code == [code, code]
    with pytest.raises(ConfigError, match="route=cod: expected auto or a column: base, code"):
        generate(model, [PROMPT], max_tokens=8, route="cod")


def test_evidence_chooses_the_column_while_generating() -> None:
    """Each token is the most likely one of the model as routed up to there."""
    model = small_model(module_agg="avg", module_seq_len=4, module_names=["code"])
    names = model.column_names
    (new,) = generate(model, [PROMPT], max_tokens=10, candidates=names)
    tokens = torch.tensor([PROMPT + new])
    routes = choose_routes(model, names, tokens)
    assert set(routes.flatten().tolist()) == {0, 1}
    expected = model(tokens, routes=routes)[0, len(PROMPT) - 1 : -1].argmax(-1)
    assert new == expected.tolist()


# Sampling


def draws(logits: torch.Tensor, n: int = 400, **options: Any) -> list[int]:
    generator = torch.Generator().manual_seed(0)
    return [sample(logits, generator=generator, **options) for _ in range(n)]


LOGITS = torch.tensor([0.1, 0.4, 0.15, 0.05, 0.3]).log()


def test_temperature_zero_takes_the_most_likely() -> None:
    assert sample(LOGITS, temperature=0) == 1
    assert set(draws(LOGITS, 20, temperature=0, top_k=3)) == {1}


def test_frequencies_follow_the_probabilities() -> None:
    counts = torch.bincount(torch.tensor(draws(LOGITS, 4000, temperature=1.0)), minlength=5)
    torch.testing.assert_close(counts / 4000, LOGITS.exp(), rtol=0, atol=0.03)


def test_temperature_sharpens() -> None:
    counts = torch.bincount(torch.tensor(draws(LOGITS, 4000, temperature=0.5)), minlength=5)
    squared = LOGITS.exp() ** 2 / (LOGITS.exp() ** 2).sum()
    torch.testing.assert_close(counts / 4000, squared, rtol=0, atol=0.03)
    assert set(draws(LOGITS, 50, temperature=1e-300)) == {1}


@pytest.mark.parametrize(("k", "kept"), [(1, {1}), (2, {1, 4}), (3, {1, 4, 2}), (9, {*range(5)})])
def test_top_k_keeps_the_k_most_likely(k: int, kept: set[int]) -> None:
    assert set(draws(LOGITS, temperature=1.0, top_k=k)) == kept


@pytest.mark.parametrize(
    ("p", "kept"),
    [
        (0.01, {1}),
        (0.39, {1}),
        (0.41, {1, 4}),
        (0.69, {1, 4}),
        (0.71, {1, 4, 2}),
        (1.0, {*range(5)}),
    ],
)
def test_top_p_keeps_the_fewest_that_hold_p(p: float, kept: set[int]) -> None:
    assert set(draws(LOGITS, temperature=1.0, top_p=p)) == kept


def test_top_p_is_of_what_top_k_left() -> None:
    """Of {0.4, 0.3} the first alone holds 4/7."""
    assert set(draws(LOGITS, temperature=1.0, top_k=2, top_p=0.55)) == {1}
    assert set(draws(LOGITS, temperature=1.0, top_k=2, top_p=0.6)) == {1, 4}


@given(
    logits=st.lists(st.floats(-50, 50), min_size=1, max_size=20),
    temperature=st.floats(0.05, 5),
    k=st.integers(1, 25),
    p=st.floats(0.01, 1),
)
@settings(deadline=None, max_examples=100)
def test_a_sample_is_among_the_k_most_likely(
    logits: list[float], temperature: float, k: int, p: float
) -> None:
    values = torch.tensor(logits)
    found = sample(values, temperature=temperature, top_k=k, top_p=p)
    assert (values > values[found]).sum() < k
