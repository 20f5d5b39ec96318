"""The order of an epoch: a bijection, well mixed, and near enough on the disk."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modular_lm.data.permutation import Blocks, epoch_order, permute

KEYS = st.integers(0, 2**64 - 1)


@given(st.integers(1, 5000), KEYS)
@settings(deadline=None, max_examples=80)
def test_permutation_is_a_bijection_of_any_size(n: int, key: int) -> None:
    assert np.sort(permute(np.arange(n), n, key)).tolist() == list(range(n))


@given(st.integers(1, 5000), KEYS, st.integers(1, 50), st.integers(1, 12))
@settings(deadline=None, max_examples=200)
def test_an_epoch_is_a_bijection_of_any_size(n: int, key: int, samples: int, window: int) -> None:
    order = epoch_order(np.arange(n), n, key, Blocks(samples, window))
    assert np.sort(order).tolist() == list(range(n))


@given(st.lists(st.integers(0, 9999), min_size=1, max_size=30), KEYS)
@settings(deadline=None, max_examples=40)
def test_any_subset_of_an_epoch_is_located_alike(nth: list[int], key: int) -> None:
    blocks = Blocks(16, 8)
    together = epoch_order(np.array(nth), 10_000, key, blocks)
    alone = [epoch_order(np.array([i]), 10_000, key, blocks)[0] for i in nth]
    assert together.tolist() == alone


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


def test_a_window_reads_few_places_and_a_step_reads_from_all_of_them() -> None:
    blocks, n, key = Blocks(256, 128), 10_000_000, 11
    window = blocks.samples * blocks.window
    order = epoch_order(np.arange(3 * window, 4 * window), n, key, blocks)
    places = (order - key % blocks.samples) // blocks.samples
    assert len(np.unique(places)) == blocks.window
    # Places of a window are spread over the source, and neighbours are as far apart as at random.
    assert np.abs(np.diff(np.unique(places))).max() > 100
    assert np.abs(np.diff(order)).mean() == pytest.approx(n / 3, rel=0.1)
    # In a batch of as many samples as there are places, as many pairs share one as at random.
    batches = places.reshape(-1, blocks.window)
    shared = np.mean([blocks.window - len(np.unique(batch)) for batch in batches])
    at_random = blocks.window * (1 - 1 / blocks.window) ** blocks.window
    assert shared == pytest.approx(at_random, rel=0.05)


def test_epochs_cut_blocks_elsewhere() -> None:
    orders = [epoch_order(np.arange(64), 10_000, key, Blocks(16, 4)) for key in (3, 4)]
    starts = [
        np.unique((order - key) // 16).size for order, key in zip(orders, (3, 4), strict=True)
    ]
    assert starts == [4, 4]
    assert np.unique((orders[0] - 4) // 16).size > 4


def test_golden_order() -> None:
    """Changing these reorders every run; raise `plan.ORDER` with them."""
    order = epoch_order(np.array([0, 1, 2, 500, 999]), 1000, 42, Blocks(10, 7))
    assert order.tolist() == [625, 866, 871, 715, 873]
