"""Sums by position are exact, whoever adds them up, and folded as by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from modular_lm.eval.positions import ChunkCurves, LossSums, fold, write_curves

NAN = math.nan


def sums_of(losses: Tensor, scored: Tensor, seq_len: int | None = None) -> LossSums:
    sums = LossSums.zeros(seq_len or losses.shape[1])
    sums.accumulate(losses, scored)
    return sums


def rows(lengths: list[int], width: int, seed: int) -> tuple[Tensor, Tensor]:
    """Losses [n, width] that are multiples of 1/1024, so that their sums are exact, and a mask."""
    generator = torch.Generator().manual_seed(seed)
    losses = torch.randint(0, 8192, (len(lengths), width), generator=generator) / 1024
    return losses, torch.arange(width) < torch.tensor(lengths)[:, None]


def by_hand() -> ChunkCurves:
    """Documents of 5 and 3 tokens in chunks of 2, of a model that reads at most 6."""
    losses = torch.tensor([[4.0, 2.0, 3.0, 1.0, 2.5], [6.0, 1.0, 1.0, NAN, 0.0]])
    scored = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]], dtype=torch.bool)
    return fold(sums_of(losses, scored, seq_len=6), 2)


def test_a_fold_by_hand() -> None:
    curves = by_hand()
    assert curves.position_in_chunk.describe() == {"nll": [16.5 / 5, 4 / 3], "count": [5, 3]}
    assert curves.position_in_first_chunk.describe() == {"nll": [5.0, 1.5], "count": [2, 2]}
    assert curves.position_in_later_chunks.describe() == {"nll": [6.5 / 3, 1.0], "count": [3, 1]}
    assert curves.chunk_index.describe() == {"nll": [13 / 4, 5 / 3, 2.5], "count": [4, 3, 1]}


def test_figures_by_hand() -> None:
    assert by_hand().metrics() == {
        "nll_later_chunks": 7.5 / 4,
        "nll_chunk_start": 6.5 / 3,
        "nll_chunk_end": 1.0,
    }


def test_the_end_of_a_chunk_is_its_last_quarter() -> None:
    losses = torch.arange(20.0)[None]
    metrics = fold(sums_of(losses, torch.ones(1, 20, dtype=torch.bool)), 10).metrics()
    # Of ten positions the last two; of one position that one.
    assert metrics["nll_chunk_end"] == (18 + 19) / 2
    single = fold(sums_of(losses, torch.ones(1, 20, dtype=torch.bool)), 1).metrics()
    assert single["nll_chunk_end"] == single["nll_chunk_start"] == sum(range(1, 20)) / 19


def test_figures_without_tokens_are_left_out() -> None:
    losses, scored = torch.ones(1, 8), torch.ones(1, 8, dtype=torch.bool)
    assert fold(sums_of(losses[:, :4], scored[:, :4], seq_len=8), 4).metrics() == {}
    beginning = fold(sums_of(losses[:, :6], scored[:, :6], seq_len=8), 4).metrics()
    assert beginning.keys() == {"nll_later_chunks", "nll_chunk_start"}


@given(
    lengths=st.lists(st.integers(0, 13), min_size=1, max_size=9),
    batch=st.integers(1, 4),
    ranks=st.integers(1, 3),
    seed=st.integers(0, 99),
)
@settings(deadline=None, max_examples=50)
def test_batches_and_ranks_change_no_bit(
    lengths: list[int], batch: int, ranks: int, seed: int
) -> None:
    losses, scored = rows(lengths, 13, seed)
    whole = sums_of(losses, scored)
    total = LossSums.zeros(13)
    for rank in range(ranks):
        share, mine = losses[rank::ranks], scored[rank::ranks]
        of_rank = LossSums.zeros(13)
        for some, known in zip(share.split(batch), mine.split(batch), strict=True):
            if len(some):
                # As wide as the longest of them.
                width = int(known.sum(1).max())
                of_rank.accumulate(some[:, :width], known[:, :width])
        total = total + of_rank
    assert torch.equal(total.nll, whole.nll)
    assert torch.equal(total.count, whole.count)


@given(
    lengths=st.lists(st.integers(0, 17), min_size=1, max_size=6),
    chunk_len=st.integers(1, 20),
    seed=st.integers(0, 99),
)
@settings(deadline=None, max_examples=60)
def test_every_curve_holds_each_token_once(lengths: list[int], chunk_len: int, seed: int) -> None:
    losses, scored = rows(lengths, 17, seed)
    curves = fold(sums_of(losses, scored), chunk_len)
    n_chunks = math.ceil(17 / chunk_len)
    position, chunk = [0.0] * chunk_len, [0.0] * n_chunks
    later = 0.0
    for row, length in zip(losses.tolist(), lengths, strict=True):
        for t in range(length):
            position[t % chunk_len] += row[t]
            chunk[t // chunk_len] += row[t]
            later += row[t] if t >= chunk_len else 0.0
    assert curves.position_in_chunk.nll.tolist() == position
    assert curves.chunk_index.nll.tolist() == chunk
    assert curves.position_in_later_chunks.nll.sum() == later
    for curve in (curves.position_in_chunk, curves.chunk_index):
        assert curve.count.sum() == sum(lengths)
        assert curve.nll.sum() == losses[scored].double().sum()
        told = curve.describe()
        total = sum((m or 0) * n for m, n in zip(told["nll"], told["count"], strict=True))
        assert total == pytest.approx(sum(position), rel=1e-12)


def test_a_token_too_many_is_no_rounding_error() -> None:
    """In fp32 a sum of 2**24 no longer grows by one."""
    sums = LossSums(torch.full((1,), 2.0**24).double(), torch.full((1,), 2.0**24).double())
    sums.accumulate(torch.ones(1, 1), torch.ones(1, 1, dtype=torch.bool))
    assert sums.nll.item() == sums.count.item() == 2**24 + 1


# ------------------------------------------------------------------ the file


def test_the_file_needs_none_of_our_tools(tmp_path: Path) -> None:
    path = tmp_path / "evals" / "0000000007" / "positions.json"
    curves = by_hand()
    write_curves(path, 7, {"web": curves, "all": curves})
    report = json.loads(path.read_text())
    assert (report["step"], report["chunk_len"], report["unit"]) == (7, 2, "nats per token")
    assert list(report["sources"]) == ["web", "all"]
    assert report["sources"]["web"] == {
        "position_in_chunk": {"nll": [3.3, 4 / 3], "count": [5, 3]},
        "position_in_first_chunk": {"nll": [5.0, 1.5], "count": [2, 2]},
        "position_in_later_chunks": {"nll": [6.5 / 3, 1.0], "count": [3, 1]},
        "chunk_index": {"nll": [3.25, 5 / 3, 2.5], "count": [4, 3, 1]},
    }


def test_what_is_no_number_is_null(tmp_path: Path) -> None:
    losses = torch.tensor([[1.0, NAN, math.inf]])
    curves = fold(sums_of(losses, torch.ones(1, 3, dtype=torch.bool), seq_len=5), 3)
    write_curves(tmp_path / "x.json", 1, {"web": curves})
    found = json.loads((tmp_path / "x.json").read_text(), parse_constant=pytest.fail)
    assert found["sources"]["web"]["position_in_first_chunk"]["nll"] == [1.0, None, None]
    assert found["sources"]["web"]["position_in_later_chunks"] == {
        "nll": [None] * 3,
        "count": [0] * 3,
    }


def test_a_step_done_again_replaces_its_file(tmp_path: Path) -> None:
    path = tmp_path / "positions.json"
    for nll in (1.0, 2.0):
        curves = fold(sums_of(torch.full((1, 4), nll), torch.ones(1, 4, dtype=torch.bool)), 2)
        write_curves(path, 5, {"web": curves})
    (source,) = json.loads(path.read_text())["sources"].values()
    assert source["chunk_index"]["nll"] == [2.0, 2.0]
    write_curves(path, 5, {})
    assert list(tmp_path.iterdir()) == []
    write_curves(path, 5, {})
