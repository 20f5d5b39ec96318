"""A run's samples: who gets which, what they hold, and what makes two data sets the same."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modular_lm.config.schema import DataConfig, PrepareConfig, TokenizerConfig
from modular_lm.data.dataset import (
    Dataset,
    LocalLoader,
    check_fingerprint,
    document_ids,
    rank_range,
)
from modular_lm.data.prepare import prepare_sources
from modular_lm.data.reader import SourceReader
from modular_lm.errors import ConfigError, DataError
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
    data = Dataset(config(root), TOKENIZER)
    index = np.arange(40)
    where, tokens = data.plan.locate(index), data.read(index)
    for name, number in (("a", 0), ("b", 1)):
        mine = where.source == number
        windows = SourceReader(root / name).windows(where.position[mine], 16)
        assert (tokens[mine] == windows).all()
        assert (tokens[mine] == ord(name)).any()
    assert (where.source == 0).sum() == 30


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_any_world_size_gives_the_same_global_batches(root: Path, world_size: int) -> None:
    data = Dataset(config(root), TOKENIZER)
    loaders = [LocalLoader(data, 6, rank, world_size) for rank in range(world_size)]
    for step, parts in enumerate(zip(*(loader.steps(0, 7) for loader in loaders), strict=True)):
        assert all(part.step == step for part in parts)
        index = np.concatenate([part.index for part in parts])
        tokens = np.concatenate([part.tokens for part in parts])
        assert index.tolist() == list(range(step * 6, step * 6 + 6))
        assert (tokens == data.read(index)).all()


def test_the_fingerprint_is_of_content_and_order_not_of_place(root: Path, tmp_path: Path) -> None:
    here = Dataset(config(root), TOKENIZER).fingerprint()
    moved = tmp_path / "elsewhere"
    moved.symlink_to(root)
    check_fingerprint(here, Dataset(config(moved), TOKENIZER).fingerprint())
    for change, name in [
        ({"seed": 6}, "data.seed"),
        ({"seq_len": 8}, "data.seq_len"),
        ({"sources": {"a": 0.5, "b": 0.5}}, "data.sources.a"),
        ({"sources": {"a": 1.0}}, "data.sources.b"),
    ]:
        other = Dataset(config(root, **change), TOKENIZER).fingerprint()
        with pytest.raises(DataError, match=f"have changed since it began.*{name}"):
            check_fingerprint(here, other)


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


def test_documents_without_borders_cannot_be_kept_apart(root: Path, tmp_path: Path) -> None:
    text = root.parent / "text"
    made = PrepareConfig(src=str(text), dst=str(tmp_path), add_bos=False, add_eos=False)
    prepare_sources(made)
    Dataset(config(tmp_path), TOKENIZER)
    with pytest.raises(ConfigError, match=r"data\.document_mask=true: data\.sources\.a .*add_bos"):
        Dataset(config(tmp_path, document_mask=True), TOKENIZER)
