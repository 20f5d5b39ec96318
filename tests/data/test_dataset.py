"""A run's samples: who gets which, what they hold, and what makes two data sets the same."""

from __future__ import annotations

import dataclasses
import json
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from modular_lm.config.schema import DataConfig, PrepareConfig, TokenizerConfig
from modular_lm.data.dataset import (
    Dataset,
    LocalLoader,
    document_ids,
    micro_batches,
    rank_range,
)
from modular_lm.data.fingerprint import differences, digest
from modular_lm.data.prepare import prepare_sources
from modular_lm.data.reader import SourceReader
from modular_lm.errors import ConfigError
from modular_lm.tokenizer import build_tokenizer

TOKENIZER = build_tokenizer(TokenizerConfig())


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two prepared sources whose texts cannot be confused."""
    folder = tmp_path_factory.mktemp("data")
    for name, letter in (("a", "a"), ("b", "b")):
        (folder / "text" / name).mkdir(parents=True)
        texts = [{"text": letter * (20 + 7 * i % 90)} for i in range(60)]
        lines = "\n".join(json.dumps(text) for text in texts)
        (folder / "text" / name / "part.jsonl").write_text(lines)
    prepare_sources(PrepareConfig(src=str(folder / "text"), dst=str(folder / "out")))
    return folder / "out"


def config(root: Path, **changes: object) -> DataConfig:
    base = DataConfig(root_dir=str(root), sources={"a": 0.75, "b": 0.25}, seq_len=16, seed=5)
    return dataclasses.replace(base, **changes)  # type: ignore[arg-type]


@given(st.integers(1, 500), st.integers(1, 64), st.integers(0, 1000))
@settings(deadline=None)
def test_ranks_share_a_global_batch_without_gap_or_overlap(
    batch: int, world_size: int, step: int
) -> None:
    ranges = [rank_range(step, batch, rank, world_size) for rank in range(world_size)]
    joined = [i for first, last in ranges for i in range(first, last)]
    assert joined == list(range(step * batch, (step + 1) * batch))
    sizes = [last - first for first, last in ranges]
    assert max(sizes) - min(sizes) <= 1


def test_a_sample_holds_the_window_of_its_source(root: Path) -> None:
    data = Dataset(config(root), TOKENIZER, 6)
    index = np.arange(40)
    where, tokens = data.plan.locate(index), data.read(index)
    for name, number in (("a", 0), ("b", 1)):
        mine = where.source == number
        windows = SourceReader(root / name).windows(where.position[mine], 16)
        assert (tokens[mine] == windows).all()
        assert (tokens[mine] == ord(name)).any()
    assert (where.source == 0).sum() == 30


@given(
    weights=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    seq_len=st.integers(1, 40),
    global_batch=st.integers(8, 24),
    micro_batch=st.integers(1, 9),
    stage=st.integers(1, 9),
    attempts=st.lists(
        st.tuples(st.sampled_from([1, 2, 3, 4, 8]), st.integers(0, 4), st.integers(0, 3)),
        min_size=1,
        max_size=5,
    ),
    seed=st.integers(0, 99),
)
@settings(
    deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_any_world_micro_batch_and_restart_gives_the_same_global_batches(
    root: Path, weights, seq_len, global_batch, micro_batch, stage, attempts, seed
) -> None:
    """Attempts of (world size, steps that last, steps lost): what led to the end is the plan."""
    changed = config(
        root,
        sources=dict(zip("ab", weights, strict=True)),
        stages={str(stage): {"b": 1.0}},
        seq_len=seq_len,
        seed=seed,
    )
    data = pickle.loads(pickle.dumps(Dataset(changed, TOKENIZER, global_batch)))
    kept: dict[int, tuple[list[int], bytes]] = {}
    start = 0
    for world_size, lasting, lost in attempts:
        most = -(-global_batch // world_size)
        loaders = [LocalLoader(data, global_batch, r, world_size) for r in range(world_size)]
        ranks = [loader.steps(start, start + lasting + lost) for loader in loaders]
        for step, parts in enumerate(zip(*ranks, strict=True), start):
            cut = [micro_batches(part.tokens, most, micro_batch) for part in parts]
            assert len({len(passes) for passes in cut}) == 1
            assert all(len(rows) <= micro_batch for passes in cut for rows in passes)
            index = np.concatenate([part.index for part in parts])
            tokens = np.concatenate([rows for passes in cut for rows in passes])
            kept[step] = (index.tolist(), tokens.tobytes())
        start += lasting
    for step, (index, tokens) in kept.items():
        wanted = np.arange(step * global_batch, (step + 1) * global_batch)
        assert index == wanted.tolist()
        assert tokens == data.read(wanted).tobytes()
    assert sorted(kept) == list(range(len(kept)))


def test_every_token_of_an_epoch_is_seen_once_before_the_next_begins(root: Path) -> None:
    data = Dataset(config(root, sources={"a": 1.0}), TOKENIZER, 6)
    reader = SourceReader(root / "a")
    stream = np.concatenate(list(reader.documents()))
    n = reader.n_windows(16)
    for epoch in range(3):
        targets = np.sort(data.read(np.arange(epoch * n, (epoch + 1) * n))[:, 1:].ravel())
        assert (targets == np.sort(stream[1 : n * 16 + 1])).all()


# ------------------------------------------------------------------ fingerprint and digest


def test_the_fingerprint_is_of_content_and_order_not_of_place(root: Path, tmp_path: Path) -> None:
    here = Dataset(config(root), TOKENIZER, 6).fingerprint()
    moved = tmp_path / "elsewhere"
    moved.symlink_to(root)
    assert Dataset(config(moved), TOKENIZER, 6).fingerprint() == here
    for change, named in [
        ({"seed": 6}, ["data.seed: 5 -> 6"]),
        ({"seq_len": 8}, ["data.seq_len: 16 -> 8"]),
        (
            {"sources": {"a": 0.5, "b": 0.5}},
            ["data.sources.a: 0.75 -> 0.5", "data.sources.b: 0.25 -> 0.5"],
        ),
        ({"stages": {"3": {"b": 1.0}}}, ["data.stages.3.b: None -> 1"]),
    ]:
        other = Dataset(config(root, **change), TOKENIZER, 6).fingerprint()
        assert differences(here, other, steps=10) == named


def test_other_shards_are_another_source(root: Path, tmp_path: Path) -> None:
    here = Dataset(config(root), TOKENIZER, 6).fingerprint()
    text = str(root.parent / "text")
    prepare_sources(PrepareConfig(src=text, dst=str(tmp_path), seed=7))
    (one, other) = differences(here, Dataset(config(tmp_path), TOKENIZER, 6).fingerprint(), 1)
    assert one.startswith("data.shards.a: ")
    assert other.startswith("data.shards.b: ")


def test_what_has_not_begun_may_still_change(root: Path) -> None:
    only_a = {"sources": {"a": 1.0}}
    before = Dataset(config(root, **only_a), TOKENIZER, 6).fingerprint()
    staged = Dataset(config(root, **only_a, stages={"8": {"b": 1.0}}), TOKENIZER, 6).fingerprint()
    assert differences(before, staged, steps=8) == []
    assert differences(before, staged, steps=9) == [
        f"data.shards.b: None -> {staged['data.shards.b']}",
        "data.stages.8.b: None -> 1",
    ]


@given(st.permutations(range(12)), st.lists(st.integers(1, 11), max_size=3))
@settings(deadline=None, max_examples=30)
def test_the_digest_depends_on_samples_not_on_who_saw_them(
    order: list[int], cuts: list[int]
) -> None:
    tokens = np.random.default_rng(0).integers(0, 999, (12, 9), dtype=np.uint16)
    index = np.arange(100, 112)
    whole = digest(index, tokens)
    parts = np.split(np.array(order), sorted(cuts))
    assert sum(digest(index[p], tokens[p].astype(np.uint32)) for p in parts) % 2**64 == whole
    other = tokens.copy()
    other[3, 4] ^= 1
    assert digest(index, other) != whole
    assert (digest(index[order], tokens) == whole) == (order == list(range(12)))


# ------------------------------------------------------------------ documents


def test_documents_of_a_sample_begin_with_bos_or_behind_eos() -> None:
    bos, eos = TOKENIZER.bos_id, TOKENIZER.eos_id
    tokens = np.array(
        [
            [7, eos, bos, 8, 8, eos, bos, 9],  # both: one border each
            [bos, 7, 7, bos, bos, 8, 8, 8],  # only BOS; the first opens nothing new
            [7, eos, 8, eos, eos, 9, 9, eos],  # only EOS
        ]
    )
    expected = [[0, 0, 1, 1, 1, 1, 2, 2], [0, 0, 0, 1, 2, 2, 2, 2], [0, 0, 1, 1, 2, 3, 3, 3]]
    assert document_ids(tokens, TOKENIZER).tolist() == expected


def test_one_token_may_be_bos_and_eos() -> None:
    """As in GPT-2; of two in a row, as prepare writes them, the first ends a document."""
    tokens = np.array([[9, 1, 2, 3, 9, 9, 4, 5, 9], [1, 9, 2, 9, 9, 3, 9, 4, 4]])
    both: Any = SimpleNamespace(bos_id=9, eos_id=9)
    expected = [[0, 0, 0, 0, 0, 1, 1, 1, 2], [0, 1, 1, 1, 2, 2, 3, 3, 3]]
    assert document_ids(tokens, both).tolist() == expected


def test_documents_without_borders_cannot_be_kept_apart(root: Path, tmp_path: Path) -> None:
    text = root.parent / "text"
    made = PrepareConfig(src=str(text), dst=str(tmp_path), add_bos=False, add_eos=False)
    prepare_sources(made)
    Dataset(config(tmp_path), TOKENIZER, 6)
    with pytest.raises(ConfigError, match=r"data\.document_mask=true: data\.sources\.a .*add_bos"):
        Dataset(config(tmp_path, document_mask=True), TOKENIZER, 6)
