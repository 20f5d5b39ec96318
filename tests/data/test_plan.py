"""The order of the data: sources, epochs and positions together."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modular_lm.data.mixture import Stage
from modular_lm.data.permutation import Blocks
from modular_lm.data.plan import DataPlan, Source
from modular_lm.errors import ConfigError

MINI = {"wiki": 0.4, "books": 0.3, "gov": 0.2, "web": 0.1}


def plan(weights: dict[str, float], n_samples: int = 37, seed: int = 1) -> DataPlan:
    sources = [Source(name, n_samples + i) for i, name in enumerate(weights)]
    return DataPlan(sources, [Stage(0, weights, "data.sources")], seed, Blocks(4, 3))


@given(
    st.integers(5, 60), st.integers(5, 60), st.integers(0, 5),
    st.integers(1, 7), st.integers(1, 4), st.integers(1, 150),
)  # fmt: skip
@settings(deadline=None, max_examples=40)
def test_every_sample_comes_once_before_any_comes_again(
    n_a: int, n_b: int, seed: int, samples: int, window: int, border: int
) -> None:
    """Also across a stage that draws the sources otherwise."""
    stages = [Stage(0, {"a": 7, "b": 3}, ""), Stage(border, {"a": 1, "b": 4}, "")]
    p = DataPlan([Source("a", n_a), Source("b", n_b)], stages, seed, Blocks(samples, window))
    where = p.locate(np.arange(300))
    for i, source in enumerate(p.sources):
        mine = where.source == i
        epoch, position = where.epoch[mine], where.position[mine]
        assert (np.diff(epoch) >= 0).all()
        for e in range(int(epoch.max())):  # all but the last, which is cut short
            assert sorted(position[epoch == e].tolist()) == list(range(source.n_samples))


def test_a_small_source_repeats_beside_a_part_of_a_large_one() -> None:
    sources = [Source("large", 10**12), Source("small", 50)]
    p = DataPlan(sources, [Stage(0, {"large": 9, "small": 1}, "")], 1, Blocks(256))
    where = p.locate(np.arange(2000))
    assert where.epoch[where.source == 0].max() == 0
    assert np.bincount(where.epoch[where.source == 1]).tolist() == [50, 50, 50, 50]


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
        DataPlan([Source("tiny", 0)], [Stage(0, {"tiny": 1.0}, "")], 0, Blocks(1))
