"""The recall task asks what it should, and separates the modes as docs/results/recall.md says."""

from __future__ import annotations

import pytest
import torch

from benchmarks._runs import in_processes
from benchmarks.recall import CHUNK, FILLER, N_KEYS, N_PAIRS, SEQ_LEN, Run, make_batch, train
from modular_lm.model.lm import IGNORE

HALF = SEQ_LEN // 2


def test_every_answer_stands_in_the_first_half_and_only_there() -> None:
    inputs, targets = make_batch(200, torch.Generator().manual_seed(3))
    assert HALF % CHUNK == 0
    for row, wanted in zip(inputs.tolist(), targets.tolist(), strict=True):
        known = {k: row[i + 1] for i, k in enumerate(row[:HALF]) if k < N_KEYS}
        asked = {row[i]: (i, value) for i, value in enumerate(wanted) if value != IGNORE}
        assert len(known) == len(asked) == N_PAIRS
        assert {k: value for k, (_, value) in asked.items()} == known
        assert all(i >= HALF and N_KEYS <= value < FILLER for i, value in asked.values())


def test_pairs_queries_and_values_are_spread_evenly() -> None:
    inputs, targets = make_batch(4000, torch.Generator().manual_seed(4))
    at = (inputs < N_KEYS).double().mean(0)
    assert at[::2].sub(0.5).abs().max() < 0.05  # 4 keys on 8 even places, in either half
    assert at[1::2].max() == 0
    answers = targets[targets != IGNORE]
    shares = torch.bincount(answers - N_KEYS).double() / len(answers)
    assert shares.sub(0.125).abs().max() < 0.01


@pytest.mark.slow
def test_modes_recall_across_chunks_as_much_as_they_carry() -> None:
    # 600 of the benchmark's 2000 steps: already then they are far apart.
    runs = [Run(mode, steps=600, seed=0) for mode in ("drop", "avg", "stack_m4")]
    drop, avg, stack = (outcome.accuracy for outcome in in_processes(train, runs))
    assert drop < 0.2
    assert avg > 0.4
    assert stack > 0.9
