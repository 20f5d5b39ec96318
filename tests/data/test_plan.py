"""The order of the data: proportions, permutations, epochs; all as properties."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modular_lm.data.plan import DataPlan, Source, permute, schedule, slots_of_weights
from modular_lm.errors import ConfigError

MINI = {"wiki": 0.4, "books": 0.3, "gov": 0.2, "web": 0.1}


def plan(weights: dict[str, float], n_samples: int = 37, seed: int = 1) -> DataPlan:
    return DataPlan([Source(n, w, n_samples + i) for i, (n, w) in enumerate(weights.items())], seed)


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
    source = plan(MINI).locate(np.arange(batch * 1000)).source.reshape(1000, batch)
    counts = np.stack([(source == i).sum(1) for i in range(4)], axis=1)
    assert np.abs(counts - batch * np.array([*MINI.values()])).max() < 1


def test_weights_in_thousandths_are_exact_over_a_thousand_samples() -> None:
    weights = {"a": 0.123, "b": 0.377, "c": 0.5}
    source = plan(weights).locate(np.arange(5000)).source.reshape(5, 1000)
    for period in source:
        assert np.bincount(period).tolist() == [123, 377, 500]


def test_other_weights_are_rounded_to_ten_thousandths() -> None:
    slots = slots_of_weights((("a", 1.0), ("b", 1.0), ("c", 1.0)))
    assert sorted(slots) == [3333, 3333, 3334]
    with pytest.raises(ConfigError, match=r"data\.sources\.b=1e-06: less than"):
        slots_of_weights((("a", 1.0), ("b", 1e-6)))


@given(st.integers(1, 5000), st.integers(0, 2**63 - 1))
@settings(deadline=None, max_examples=80)
def test_permutation_is_a_bijection_of_any_size(n: int, key: int) -> None:
    assert np.sort(permute(np.arange(n), n, key)).tolist() == list(range(n))


def test_permutation_mixes_neighbours() -> None:
    n = 100_003
    order = permute(np.arange(n), n, 7)
    # For a random permutation the mean distance of neighbours is n / 3, with 0.2 % deviation.
    assert np.abs(np.diff(order)).mean() == pytest.approx(n / 3, rel=0.02)
    assert abs(np.corrcoef(np.arange(n), order)[0, 1]) < 0.02


def test_permutation_holds_beyond_32_bits() -> None:
    n = 2**40 + 12345
    found = permute(np.array([0, 1, n - 1], np.int64), n, 3)
    assert len(set(found.tolist())) == 3
    assert found.min() >= 0
    assert found.max() < n


@given(st.integers(1, 60), st.integers(1, 60), st.integers(0, 5))
@settings(deadline=None, max_examples=40)
def test_every_sample_comes_once_before_any_comes_again(n_a: int, n_b: int, seed: int) -> None:
    p = DataPlan([Source("a", 0.7, n_a), Source("b", 0.3, n_b)], seed)
    where = p.locate(np.arange(1000))
    for i, source in enumerate(p.sources):
        mine = where.source == i
        epoch, position = where.epoch[mine], where.position[mine]
        assert (np.diff(epoch) >= 0).all()
        for e in range(int(epoch.max())):  # all but the last, which is cut short
            assert sorted(position[epoch == e].tolist()) == list(range(source.n_samples))


def test_order_depends_on_seed_and_epoch_only() -> None:
    index = np.arange(200)
    one, again, other = plan(MINI), plan(MINI), plan(MINI, seed=2)
    assert (one.locate(index).position == again.locate(index).position).all()
    assert (one.locate(index).source == other.locate(index).source).all()
    assert (one.locate(index).position != other.locate(index).position).any()
    single = plan({"a": 1.0}, n_samples=50)
    first, second = single.locate(np.arange(100)).position.reshape(2, 50)
    assert (first != second).any()


@given(st.lists(st.integers(0, 10**12), min_size=1, max_size=20))
@settings(deadline=None, max_examples=40)
def test_any_subset_of_indices_is_located_alike(indices: list[int]) -> None:
    p = plan(MINI, n_samples=1000)
    together = p.locate(np.array(indices))
    for k, index in enumerate(indices):
        alone = p.locate([index])
        assert (alone.source[0], alone.epoch[0], alone.position[0]) == (
            together.source[k],
            together.epoch[k],
            together.position[k],
        )


def test_a_source_without_a_whole_sample_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"data\.sources\.tiny: holds less than one sample"):
        DataPlan([Source("tiny", 1.0, 0)], 0)
