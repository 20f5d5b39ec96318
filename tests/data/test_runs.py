"""Runs: a range of keys gives exactly its documents, and reads not much more."""

from __future__ import annotations

import os
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modular_lm.data.runs import KEYS, RECORD, Piece, in_order, read_range, token_starts, write_run
from modular_lm.errors import DataError

DTYPE = np.dtype("<u2")
keys = st.integers(0, KEYS - 1) | st.sampled_from([0, 1, KEYS // 2, KEYS - 1])


def make_run(file: Path, keys: list[int], seed: int = 0) -> list[tuple[int, list[int]]]:
    """A run of documents with these keys; the same as (key, tokens) in order."""
    draw = np.random.default_rng(seed)
    keys = sorted(keys)
    documents = [draw.integers(0, 1 << 16, draw.integers(1, 9)).astype(DTYPE) for _ in keys]
    rows = [(k, 10, len(d), 1) for k, d in zip(keys, documents, strict=True)]
    size = write_run(file, np.array(rows, RECORD), documents)
    assert file.stat().st_size == size
    return [(k, d.tolist()) for k, d in zip(keys, documents, strict=True)]


def listed(piece: Piece) -> list[tuple[int, list[int]]]:
    starts = piece.starts
    return [
        (int(record["key"]), piece.tokens[starts[i] : starts[i + 1]].tolist())
        for i, record in enumerate(piece.records)
    ]


@settings(max_examples=60, deadline=None)
@given(st.lists(keys, min_size=1, max_size=300), st.lists(keys, max_size=5))
def test_ranges_cover_a_run(tmp_path_factory, found: list[int], cuts: list[int]) -> None:
    file = tmp_path_factory.mktemp("runs") / "a.run"
    expected = make_run(file, found)
    borders = [0, *sorted(cuts), KEYS]
    pieces = [read_range(file, DTYPE, a, b) for a, b in pairwise(borders)]
    assert [document for piece in pieces for document in listed(piece)] == expected
    for piece, (low, high) in zip(pieces, pairwise(borders), strict=True):
        assert all(low <= key < high for key in piece.records["key"].tolist())


def test_a_range_is_read_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By few reads, of not much more than what is in the range."""
    draw = np.random.default_rng(1)
    make_run(tmp_path / "a.run", draw.integers(0, KEYS, 50_000, np.uint64).tolist())
    sizes: list[int] = []
    preadv = os.preadv

    def watched(handle: int, buffers: list, at: int) -> int:
        sizes.append(sum(len(b) for b in buffers))
        return preadv(handle, buffers, at)

    monkeypatch.setattr(os, "preadv", watched)
    piece = read_range(tmp_path / "a.run", DTYPE, KEYS // 3, KEYS // 3 + KEYS // 100)
    wanted = piece.records.nbytes + piece.tokens.nbytes
    assert 400 < len(piece.records) < 600
    assert len(sizes) == 5
    assert sum(sizes) < 1.1 * wanted


def test_a_run_that_is_cut_short_is_named(tmp_path: Path) -> None:
    make_run(tmp_path / "a.run", [1, 2, 3])
    data = (tmp_path / "a.run").read_bytes()
    for size in (0, 10, len(data) // 2, len(data) - 1):
        (tmp_path / "a.run").write_bytes(data[:size])
        with pytest.raises(DataError, match=r"a\.run: cut short"):
            read_range(tmp_path / "a.run", DTYPE, 0, KEYS)


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 1), st.integers(0, 2)), max_size=30))
def test_the_order_is_one_of_documents(documents: list[tuple[int, int, int]]) -> None:
    """(key, text_bytes, token) of few values: order and copies do not depend on the input's."""

    def ordered(listed: list[tuple[int, int, int]]) -> list[tuple[tuple[int, int, int], int]]:
        records = np.array([(k, b, 1, 1) for k, b, _ in listed], RECORD)
        found = in_order(records, lambda i: np.array([listed[i][2]], DTYPE))
        return [(listed[i], copies) for i, copies in found]

    expected = [(d, documents.count(d)) for d in sorted(set(documents))]
    assert ordered(documents) == ordered(documents[::-1]) == expected


def test_token_starts() -> None:
    assert token_starts(np.array([(1, 0, 3, 1), (2, 0, 4, 1)], RECORD)).tolist() == [0, 3, 7]
    assert token_starts(np.empty(0, RECORD)).tolist() == [0]
