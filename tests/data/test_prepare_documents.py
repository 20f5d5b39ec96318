"""Prepare: duplicates and documents that are not simply a text, counted and never lost."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from modular_lm.config import PrepareConfig, TokenizerConfig
from modular_lm.data import prepare, runs, shuffle
from modular_lm.data.manifest import Manifest, Problems
from modular_lm.data.prepare import prepare_sources
from modular_lm.data.reader import SourceReader
from modular_lm.errors import DataError
from modular_lm.tokenizer import build_tokenizer
from ray_jobs.prepare import format_table

TOKENIZER = build_tokenizer(TokenizerConfig())
DISTINCT = [f"document {i} " + "la " * (i * 7 % 50) for i in range(200)]
COPIES = {i: 1 + i % 4 for i in range(200)}
TEXTS = [DISTINCT[i] for i, copies in COPIES.items() for _ in range(copies)]


def write(file: Path, records: list) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(r) + "\n" for r in records))


def texts_of(folder: Path) -> dict[str, list[str]]:
    return {
        split: [TOKENIZER.decode(d.tolist()) for d in SourceReader(folder, split).documents()]
        for split in ("train", "val")
    }


def shuffled_tasks(function, tasks) -> Iterator:
    tasks = list(tasks)
    random.Random(3).shuffle(tasks)
    return map(function, tasks)


@pytest.fixture
def config(tmp_path: Path) -> PrepareConfig:
    src, dst = str(tmp_path / "src"), str(tmp_path / "dst")
    return PrepareConfig(src, dst, val_fraction=0.2)


def scattered(folder: Path, seed: int, files: int) -> None:
    texts = random.Random(seed).sample(TEXTS, len(TEXTS))
    for i in range(files):
        write(folder / "wiki" / f"{i}.jsonl", [{"text": t} for t in texts[i::files]])


# ------------------------------------------------------------------ duplicates


@pytest.mark.parametrize("dedup", [False, True])
def test_duplicates_are_counted_and_dropped_if_asked(
    dedup: bool, config: PrepareConfig, tmp_path: Path
) -> None:
    scattered(tmp_path / "src", 0, 3)
    (manifest,) = prepare_sources(replace(config, dedup=dedup))
    found = texts_of(tmp_path / "dst" / "wiki")
    assert Counter(found["train"] + found["val"]) == Counter(DISTINCT if dedup else TEXTS)
    for split in ("train", "val"):
        mine = set(found[split])
        copies = sum(COPIES[i] - 1 for i, t in enumerate(DISTINCT) if t in mine)
        assert manifest.duplicates[split] == copies > 0
        assert manifest.split(split).documents == len(mine) + (0 if dedup else copies)
    assert sum(manifest.duplicates.values()) == len(TEXTS) - len(DISTINCT)
    assert Manifest.load(tmp_path / "dst" / "wiki") == manifest
    remark = "dropped" if dedup else "kept; drop them with dedup=true"
    assert f"duplicates, {remark}: wiki: 300" in format_table([manifest])


@pytest.mark.parametrize("dedup", [False, True])
def test_the_result_depends_on_documents_alone(
    dedup: bool, config: PrepareConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not on files, slices, runs, ranges of a shard, temporary files, or the order of tasks."""
    scattered(tmp_path / "src", 0, 1)
    config = replace(config, dedup=dedup)
    expected = prepare_sources(config)[0]
    monkeypatch.setattr(prepare, "SMALLEST_SLICE", 1)
    monkeypatch.setattr(shuffle, "RUN_BYTES", 3000)
    for seed, (range_bytes, most_pieces) in enumerate([(1 << 20, 9), (4000, 999), (4000, 3)]):
        monkeypatch.setattr(shuffle, "RANGE_BYTES", range_bytes)
        monkeypatch.setattr(shuffle, "MOST_PIECES", most_pieces)
        other = tmp_path / f"other{seed}"
        scattered(other / "src", seed + 1, 5)
        moved = replace(config, src=str(other / "src"), dst=str(other / "dst"))
        (found,) = prepare_sources(moved, map_tasks=shuffled_tasks)
        assert (found.train, found.val) == (expected.train, expected.val)
        assert found.duplicates == expected.duplicates


@pytest.mark.parametrize("dedup", [False, True])
def test_different_documents_of_the_same_key_are_no_duplicates(
    dedup: bool, config: PrepareConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shuffle, "document_key", lambda digest, seed: digest[0] % 4 << 62)
    config, found = replace(config, dedup=dedup, shards=2), []
    for seed in (1, 2):
        scattered(tmp_path / f"src{seed}", seed, seed)
        moved = replace(config, src=str(tmp_path / f"src{seed}"), dst=str(tmp_path / f"{seed}"))
        found.append(prepare_sources(moved)[0])
        texts = texts_of(tmp_path / f"{seed}" / "wiki")
        assert Counter(texts["train"] + texts["val"]) == Counter(DISTINCT if dedup else TEXTS)
    assert found[0].fingerprint == found[1].fingerprint


def test_shards_of_a_large_corpus_go_through_files(
    config: PrepareConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scattered(tmp_path / "src", 0, 2)
    monkeypatch.setattr(shuffle, "RANGE_BYTES", 2000)
    monkeypatch.setattr(shuffle, "MOST_PIECES", 2)
    monkeypatch.setattr(runs, "_BUCKET_RECORDS", 1)
    spilled, largest = [], []
    real_spill, real_merge = shuffle._spilled, shuffle._merged

    def spill(*args):
        spilled.append(args)
        return real_spill(*args)

    def merge(pieces):
        largest.append(sum(p.tokens.nbytes + p.records.nbytes for p in pieces))
        return real_merge(pieces)

    monkeypatch.setattr(shuffle, "_spilled", spill)
    monkeypatch.setattr(shuffle, "_merged", merge)
    prepare_sources(config)
    assert len(spilled) >= 2
    assert max(largest) < 3 * 2000  # of some 80 kB
    found = texts_of(tmp_path / "dst" / "wiki")
    assert Counter(found["train"] + found["val"]) == Counter(TEXTS)
    assert [p.name for p in (tmp_path / "dst").iterdir()] == ["wiki"]


# ------------------------------------------------------------------ problems


def test_every_document_is_kept_or_counted(config: PrepareConfig, tmp_path: Path) -> None:
    records = [{"text": t} for t in ["fine", "", " \n\t", None, 5, ["a"], "n\0l", "\ud800", "x\0"]]
    write(tmp_path / "src" / "wiki" / "a.jsonl", [*records, {"id": 1}, {"content": "also"}])
    column = pa.array([b"a\xff\0", b"ok", None, b"  "], pa.binary())
    pq.write_table(pa.table({"text": column}), tmp_path / "src" / "wiki" / "b.parquet")
    pq.write_table(pa.table({"content": ["c"], "n": [1]}), tmp_path / "src" / "wiki" / "c.parquet")
    (manifest,) = prepare_sources(config)
    assert manifest.problems == Problems(missing=5, empty=3, invalid_utf8=2, nul=3)
    found = texts_of(tmp_path / "dst" / "wiki")
    kept = ["fine", "n\0l", "\ufffd", "x\0", "also", "a\ufffd\0", "ok", "c"]
    assert sorted(found["train"] + found["val"]) == sorted(kept)
    splits = (manifest.train, manifest.val)
    assert sum(s.text_bytes for s in splits) == sum(len(t.encode()) for t in kept)
    assert Manifest.load(tmp_path / "dst" / "wiki").problems == manifest.problems
    table = format_table([manifest])
    for line in (
        "skipped, text missing (null, no such key, not a string): wiki: 5",
        "skipped, without text: wiki: 3",
        "kept, invalid Unicode replaced by U+FFFD: wiki: 2",
        "kept, with NUL characters: wiki: 3",
    ):
        assert line in table


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"title": ["a"], "id": [1]}, r"b\.parquet: no column `text` or `content`, only title, id"),
        ({"text": [1.5]}, r"b\.parquet: column `text` holds double, expected text"),
        ({"text": [{"a": 1}]}, r"b\.parquet: column `text` holds struct<.*>, expected text"),
    ],
)
def test_a_file_without_texts_among_others(
    table: dict, message: str, config: PrepareConfig, tmp_path: Path
) -> None:
    write(tmp_path / "src" / "wiki" / "a.jsonl", [{"text": "fine"}])
    pq.write_table(pa.table(table), tmp_path / "src" / "wiki" / "b.parquet")
    with pytest.raises(DataError, match=message):
        prepare_sources(config)
    assert not (tmp_path / "dst").exists()


def test_a_document_of_a_million_tokens(config: PrepareConfig, tmp_path: Path) -> None:
    """Longer than a row group of a shard, and than what a run holds."""
    texts = ["x" * 1_200_000 + "end", "small"]
    write(tmp_path / "src" / "wiki" / "a.jsonl", [{"text": t} for t in texts])
    (manifest,) = prepare_sources(replace(config, val_fraction=0.0))
    assert manifest.train.tokens == sum(len(t) + 2 for t in texts)
    assert sorted(texts_of_train(tmp_path / "dst" / "wiki")) == sorted(texts)


def texts_of_train(folder: Path) -> list[str]:
    documents = SourceReader(folder, "train").documents()
    return [TOKENIZER.decode(d.tolist()) for d in documents]
