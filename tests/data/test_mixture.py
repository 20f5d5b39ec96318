"""Which source comes when: proportions, stages; all as properties."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modular_lm.data.mixture import Mixture, Stage, schedule, slots_of_weights
from modular_lm.errors import ConfigError

MINI = {"wiki": 0.4, "books": 0.3, "gov": 0.2, "web": 0.1}


def mixture(*stages: tuple[int, dict[str, float]]) -> Mixture:
    names = sorted({name for _, weights in stages for name in weights})
    return Mixture(names, [Stage(first, weights, "w") for first, weights in stages])


def deviations(source: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """[k, n + 1]: draws of each source in every prefix, minus its share of the prefix."""
    drawn = np.cumsum(source[None] == np.arange(len(shares))[:, None], axis=1)
    drawn = np.pad(drawn, ((0, 0), (1, 0)))
    return drawn - shares[:, None] * np.arange(drawn.shape[1])


@given(st.lists(st.integers(1, 1000), min_size=2, max_size=8))
@settings(deadline=None, max_examples=60)
def test_every_prefix_keeps_tijdemans_bound(slots: list[int]) -> None:
    source, before = schedule(tuple(slots))
    k = len(slots)
    assert np.bincount(source, minlength=k).tolist() == slots
    worst = np.abs(deviations(source, np.array(slots) / sum(slots))).max()
    assert worst <= 1 - 1 / (2 * k - 2) + 1e-9
    for i, n in enumerate(slots):
        assert before[source == i].tolist() == list(range(n))


@given(st.lists(st.integers(1, 300), min_size=2, max_size=6), st.integers(1, 500))
@settings(deadline=None, max_examples=40)
def test_every_window_is_within_two_draws_of_its_share(slots: list[int], length: int) -> None:
    source, _ = schedule(tuple(slots))
    source = np.tile(source, 1 + 500 // len(source) + 1)
    off = deviations(source, np.array(slots) / sum(slots))
    assert np.abs(off[:, length:] - off[:, :-length]).max() < 2


@pytest.mark.parametrize("batch", [8, 10, 16, 32, 48, 64, 100])
def test_every_global_batch_of_the_mini_weights_is_within_one_sample(batch: int) -> None:
    source = mixture((0, MINI)).draw(np.arange(batch * 1000))[0].reshape(1000, batch)
    counts = np.stack([(source == i).sum(1) for i in range(4)], axis=1)
    shares = np.array([MINI[name] for name in sorted(MINI)])
    assert np.abs(counts - batch * shares).max() < 1


@given(st.lists(st.integers(1, 998), min_size=1, max_size=4, unique=True), st.integers(0, 5000))
@settings(deadline=None, max_examples=40)
def test_thousandths_are_exact_over_any_thousand_samples(cuts: list[int], first: int) -> None:
    counts = np.diff([0, *sorted(cuts), 1000])
    weights = {f"s{i}": n / 1000 for i, n in enumerate(counts.tolist())}
    source, _ = mixture((0, weights)).draw(np.arange(first, first + 1000))
    assert np.bincount(source, minlength=len(counts)).tolist() == counts.tolist()


@pytest.mark.parametrize(
    ("weights", "slots"),
    [
        ((1.0, 1.0, 1.0), (1, 1, 1)),
        ((0.7, 0.3), (7, 3)),
        ((0.123, 0.377, 0.5), (123, 377, 500)),
        ((7 / 11, 4 / 11), (7, 4)),
        ((1.0, 0.0005), (2000, 1)),
    ],
)
def test_weights_with_a_common_denominator_are_kept_exactly(weights, slots) -> None:
    assert slots_of_weights({str(i): w for i, w in enumerate(weights)}) == slots


def test_other_weights_are_rounded_to_ten_thousandths() -> None:
    slots = slots_of_weights({"a": np.pi, "b": np.e})
    assert sum(slots) == 10_000
    assert slots[0] == round(1e4 * np.pi / (np.pi + np.e))
    with pytest.raises(ConfigError, match=r"data\.stages\.9\.b=1e-06: less than"):
        slots_of_weights({"a": 1.0, "b": 1e-6}, "data.stages.9")


# ------------------------------------------------------------------ stages


@given(
    st.lists(st.integers(1, 700), max_size=3),
    st.lists(st.dictionaries(st.sampled_from("abcd"), st.integers(1, 9), min_size=1), min_size=4),
)
@settings(deadline=None, max_examples=60)
def test_sources_go_on_where_they_were_when_a_stage_begins(
    lengths: list[int], weights: list[dict[str, int]]
) -> None:
    firsts = np.cumsum([0, *lengths]).tolist()
    stages = list(zip(firsts, weights, strict=False))
    mixed = mixture(*stages)  # type: ignore[arg-type]
    source, nth = mixed.draw(np.arange(firsts[-1] + 300))
    for number in np.unique(source):
        assert nth[source == number].tolist() == list(range(int((source == number).sum())))
    names = sorted({name for _, stage in stages for name in stage})
    for (first, stage), end in zip(stages, [*firsts[1:], firsts[-1] + 300], strict=True):
        total, here = sum(stage.values()), source[first:end]
        shares = np.array([stage.get(name, 0) / total for name in names])
        assert np.abs(deviations(here, shares)).max() < 1


def test_a_stage_changes_nothing_before_it() -> None:
    index = np.arange(2000)
    plain, staged = mixture((0, {"a": 3, "b": 1})), mixture((0, {"a": 3, "b": 1}), (800, {"b": 1}))
    for one, other in zip(plain.draw(index), staged.draw(index), strict=True):
        assert (one[:800] == other[:800]).all()
    assert set(staged.draw(index)[0][800:]) == {1}


def test_pickles_to_the_same_mixture() -> None:
    mixed = mixture((0, MINI), (70, {"web": 1.0}))
    again = pickle.loads(pickle.dumps(mixed))
    index = np.arange(500)
    assert (mixed.draw(index)[0] == again.draw(index)[0]).all()
    assert len(pickle.dumps(mixed)) < 1000
