"""Prepare: the stream is a pure function of seed and documents; problems are counted."""

from __future__ import annotations

import gzip
import json
import os
import random
import shutil
import socket
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from modular_lm.config import PrepareConfig, TokenizerConfig
from modular_lm.data import prepare, shuffle
from modular_lm.data.manifest import Manifest, Problems
from modular_lm.data.prepare import plan_sources, prepare_sources, run_plans, serial
from modular_lm.data.reader import SourceReader
from modular_lm.data.shuffle import document_key, is_validation, text_digest
from modular_lm.errors import ConfigError, DataError
from modular_lm.tokenizer import build_tokenizer

TOKENIZER = build_tokenizer(TokenizerConfig())
TEXTS = [f"document {i} " + "la " * (i * 7 % 50) for i in range(400)]


def write_jsonl(file: Path, texts: list[str]) -> None:
    data = b"".join(json.dumps({"text": t}).encode() + b"\n" for t in texts)
    pack = {".gz": gzip.compress, ".zst": zstandard.compress}.get(file.suffix, bytes)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(pack(data))


def write_parquet(file: Path, texts: list[str], group: int = 50) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"text": pa.array(texts, pa.string())}), file, row_group_size=group)


@pytest.fixture
def config(tmp_path: Path) -> PrepareConfig:
    write_jsonl(tmp_path / "src" / "wiki" / "a.jsonl", TEXTS)
    return PrepareConfig(src=str(tmp_path / "src"), dst=str(tmp_path / "dst"), val_fraction=0.1)


def documents(manifest_folder: Path, split: str) -> list[str]:
    reader = SourceReader(manifest_folder, split)
    return [TOKENIZER.decode(d.tolist()) for d in reader.documents()]


def prepared(config: PrepareConfig, **changes) -> dict[str, list[str]]:
    """The documents of source `wiki` in the order of the streams, by split."""
    config = replace(config, **changes)
    prepare_sources(config)
    return {split: documents(Path(str(config.dst)) / "wiki", split) for split in ("train", "val")}


def test_every_document_arrives_once(config: PrepareConfig) -> None:
    found = prepared(config)
    assert Counter(found["train"] + found["val"]) == Counter(TEXTS)
    assert 20 <= len(found["val"]) <= 60  # 10 % of 400


def test_manifest_counts(config: PrepareConfig, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "src" / "wiki" / "b.jsonl", ["", " \n\t", "naïve"])
    (manifest,) = prepare_sources(config)
    assert Manifest.load(tmp_path / "dst" / "wiki") == manifest
    assert manifest.problems == Problems(empty=2)
    splits = (manifest.train, manifest.val)
    assert sum(s.documents for s in splits) == 401
    text_bytes = sum(len(t.encode()) for t in [*TEXTS, "naïve"])
    assert sum(s.text_bytes for s in splits) == text_bytes
    assert sum(s.tokens for s in splits) == text_bytes + 2 * 401  # BOS and EOS
    assert [(i.name, i.size > 0) for i in manifest.inputs] == [("a.jsonl", True), ("b.jsonl", True)]


@pytest.mark.parametrize(("add_bos", "add_eos"), [(True, False), (False, True), (False, False)])
def test_bos_and_eos(add_bos: bool, add_eos: bool, config: PrepareConfig, tmp_path: Path) -> None:
    prepare_sources(replace(config, add_bos=add_bos, add_eos=add_eos))
    document = next(SourceReader(tmp_path / "dst" / "wiki").documents()).tolist()
    assert (document[0] == TOKENIZER.bos_id, document[-1] == TOKENIZER.eos_id) == (add_bos, add_eos)


# ------------------------------------------------------------------ purity


def shuffled_tasks(function, tasks) -> Iterator:
    tasks = list(tasks)
    random.Random(3).shuffle(tasks)
    return map(function, tasks)


def test_the_stream_depends_on_documents_and_seed_alone(
    config: PrepareConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = prepared(config)
    # Other formats, other files in another order, small slices and runs, tasks in any order.
    src = tmp_path / "other" / "wiki"
    write_parquet(src / "z.parquet", TEXTS[:150])
    write_jsonl(src / "b.jsonl.gz", TEXTS[150:250])
    write_jsonl(src / "c" / "a.jsonl.zst", TEXTS[250:][::-1])
    monkeypatch.setattr(prepare, "SMALLEST_SLICE", 1)
    monkeypatch.setattr(shuffle, "RUN_BYTES", 4000)
    for shards in (None, 1, 7, 30):
        other = replace(config, src=str(src.parent), dst=str(tmp_path / f"dst{shards}"))
        manifests = prepare_sources(replace(other, shards=shards), map_tasks=shuffled_tasks)
        assert prepared(replace(other, shards=shards)) == expected
        assert shards != 7 or len(manifests[0].train.shards) == 7


def test_shards_are_identical_files(config: PrepareConfig, tmp_path: Path, monkeypatch) -> None:
    (first,) = prepare_sources(replace(config, shards=3))
    monkeypatch.setattr(shuffle, "RUN_BYTES", 4000)
    again = replace(config, shards=3, dst=str(tmp_path / "again"))
    (second,) = prepare_sources(again, map_tasks=shuffled_tasks)
    assert (first.train, first.val) == (second.train, second.val)
    assert first.fingerprint == second.fingerprint


def test_the_seed_changes_the_order_but_not_the_split(
    config: PrepareConfig, tmp_path: Path
) -> None:
    one, two = (prepared(config, seed=s, dst=str(tmp_path / f"seed{s}")) for s in (1, 2))
    for split in ("train", "val"):
        assert one[split] != two[split]
        assert set(one[split]) == set(two[split])


def test_the_order_is_a_shuffle(config: PrepareConfig) -> None:
    """No trace of the input's order: rank correlation of 400 items has a deviation of 0.05."""
    place = {text: i for i, text in enumerate(TEXTS)}
    order = [place[t] for t in prepared(config, val_fraction=0.0)["train"]]
    assert abs(np.corrcoef(order, np.arange(len(order)))[0, 1]) < 0.2


def test_golden_keys() -> None:
    """Changing these reorders every corpus that is prepared again, and moves its validation set."""
    digest = text_digest(b"a document")
    assert [document_key(digest, s) for s in (0, 42)] == [2439983595775316064, 4598283303007192700]
    assert [i for i in range(60) if is_validation(text_digest(f"{i}".encode()), 0.05)] == [
        9,
        22,
        51,
    ]


def test_more_data_only_adds_to_the_validation_set(config: PrepareConfig, tmp_path: Path) -> None:
    before = prepared(config)["val"]
    write_jsonl(tmp_path / "src" / "wiki" / "b.jsonl", [f"new {i}" for i in range(200)])
    after = prepared(config, dst=str(tmp_path / "more"))["val"]
    assert set(before) < set(after)


def test_no_validation_split(config: PrepareConfig, tmp_path: Path) -> None:
    (manifest,) = prepare_sources(replace(config, val_fraction=0.0))
    assert (manifest.val.documents, manifest.val.shards) == (0, ())
    assert not list((tmp_path / "dst" / "wiki").glob("val-*"))


def test_memory_is_bounded_by_runs(config: PrepareConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shuffle, "RUN_BYTES", 4000)
    held = []
    flush = shuffle._RunBuilder.flush

    def watched(self) -> None:
        held.append(self.memory)
        flush(self)

    monkeypatch.setattr(shuffle._RunBuilder, "flush", watched)
    prepare_sources(config)
    assert len(held) > 10
    assert max(held) < 4000 + 2 * max(map(len, TEXTS)) + 1000


# ------------------------------------------------------------------ running again


def test_prepared_again_does_nothing(config: PrepareConfig, tmp_path: Path, caplog) -> None:
    first = prepare_sources(config)
    before = {f: f.stat().st_mtime_ns for f in (tmp_path / "dst").rglob("*")}
    caplog.set_level("INFO")
    assert prepare_sources(config, map_tasks=no_tasks) == first
    assert "prepare wiki: already prepared in" in caplog.text
    assert {f: f.stat().st_mtime_ns for f in (tmp_path / "dst").rglob("*")} == before


def no_tasks(function, tasks):
    raise AssertionError("there is nothing to do")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 7}, "seed: 42 -> 7"),
        (
            {"val_fraction": 0.5, "add_bos": False},
            "val_fraction: 0.1 -> 0.5; add_bos: True -> False",
        ),
        ({"shards": 2}, "shards: None -> 2"),
    ],
)
def test_prepared_differently_is_refused(config: PrepareConfig, changes, message: str) -> None:
    before = prepare_sources(config)
    with pytest.raises(DataError, match=rf"wiki is already prepared.*: {message}; set overwrite"):
        prepare_sources(replace(config, **changes))
    assert prepare_sources(config, map_tasks=no_tasks) == before
    after = prepare_sources(replace(config, **changes, overwrite=True))
    assert after[0].fingerprint != before[0].fingerprint
    assert prepare_sources(replace(config, **changes), map_tasks=no_tasks) == after
    assert [p.name for p in Path(str(config.dst)).iterdir()] == ["wiki"]


def test_other_inputs_are_refused(config: PrepareConfig, tmp_path: Path) -> None:
    prepare_sources(config)
    write_jsonl(tmp_path / "src" / "wiki" / "b.jsonl", ["more"])
    with pytest.raises(DataError, match=r"files of src: 1 of [\d,]+ bytes -> 2 of [\d,]+ bytes"):
        prepare_sources(config)


def test_a_damaged_source_is_not_taken_for_prepared(config: PrepareConfig, tmp_path: Path) -> None:
    before = prepared(config)
    (tmp_path / "dst" / "wiki" / "val-00000.parquet").unlink()
    with pytest.raises(DataError, match=r"val-00000\.parquet: named .* with overwrite=true"):
        prepare_sources(config)
    assert prepared(config, overwrite=True) == before


def test_a_shard_of_the_same_size_is_made_again_too(config: PrepareConfig, tmp_path: Path) -> None:
    before = prepared(config)
    shard = tmp_path / "dst" / "wiki" / "train-00000.parquet"
    data = bytearray(shard.read_bytes())
    data[100] ^= 1
    shard.write_bytes(data)
    with pytest.raises(DataError, match=r"differs .*prepare the source again with overwrite=true"):
        SourceReader(tmp_path / "dst" / "wiki").windows(np.arange(1), 8)
    assert prepared(config, overwrite=True) == before


def test_a_foreign_folder_is_never_replaced(config: PrepareConfig, tmp_path: Path) -> None:
    (tmp_path / "dst" / "wiki").mkdir(parents=True)
    (tmp_path / "dst" / "wiki" / "thesis.tex").touch()
    with pytest.raises(
        DataError, match=r"wiki exists and is no prepared source; choose another dst"
    ):
        prepare_sources(replace(config, overwrite=True))
    assert (tmp_path / "dst" / "wiki" / "thesis.tex").exists()


def test_two_at_once_are_refused(config: PrepareConfig, tmp_path: Path) -> None:
    """The second comes while the first works, whatever it wants to make of the source."""
    refused = []

    def interfering(function, tasks):
        with pytest.raises(DataError) as caught:
            prepare_sources(replace(config, seed=7))
        refused.append(str(caught.value))
        return serial(function, tasks)

    (manifest,) = prepare_sources(config, map_tasks=interfering)
    assert len(refused) == 2  # one in each pass
    assert set(refused) == {
        f"dst: {tmp_path / 'dst' / 'wiki'} is being prepared by process {os.getpid()} on "
        f"{socket.gethostname()}; wait for it, or choose another dst"
    }
    assert Manifest.load(tmp_path / "dst" / "wiki") == manifest
    assert [p.name for p in (tmp_path / "dst").iterdir()] == ["wiki"]


def test_what_another_has_prepared_since_the_plan_is_not_replaced(config: PrepareConfig) -> None:
    plans = plan_sources(config)
    other_plans = plan_sources(replace(config, seed=7))
    made = prepare_sources(config)
    assert run_plans(plans, no_tasks) == made
    with pytest.raises(DataError, match=r"wiki is already prepared.*: seed: 42 -> 7;"):
        run_plans(other_plans, no_tasks)


# ------------------------------------------------------------------ bad input


def test_broken_input_is_named(config: PrepareConfig, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "src" / "books" / "1.jsonl", ["fine"])
    with (tmp_path / "src" / "wiki" / "a.jsonl").open("a") as stream:
        stream.write("{broken\n")
    with pytest.raises(DataError, match=r"wiki/a\.jsonl:401: not a line of JSON"):
        prepare_sources(config)
    assert [p.name for p in (tmp_path / "dst").iterdir()] == ["books"]  # done before, and whole
    assert documents(tmp_path / "dst" / "books", "train") == ["fine"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dst": None}, r"^dst=null: name the folder"),
        ({"src": "no/such"}, r"^src=.*no/such: no such file or folder"),
        ({"tokenizer": TokenizerConfig("sp", "no.model")}, r"^tokenizer\.path=no\.model: no such"),
        ({"dst": "{src}"}, r"^dst=.*: lies in src="),
        ({"dst": "{src}/out"}, r"^dst=.*: lies in src="),
        ({"dst": "{src}/../src/wiki/a.jsonl"}, r"^dst=.*: is a file"),
    ],
)
def test_bad_configuration(config: PrepareConfig, changes, message: str, tmp_path: Path) -> None:
    changes = {k: v.format(src=config.src) if isinstance(v, str) else v for k, v in changes.items()}
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises((ConfigError, DataError), match=message):
        plan_sources(replace(config, **changes))
    assert sorted(tmp_path.rglob("*")) == before


def test_documents_without_any_text(config: PrepareConfig, tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / "src" / "wiki")
    write_jsonl(tmp_path / "src" / "wiki" / "a.jsonl", ["", "  "])
    with pytest.raises(DataError, match=r"no document of source wiki has any text"):
        prepare_sources(config)
    assert not (tmp_path / "dst").exists()
    shutil.rmtree(tmp_path / "src" / "wiki")
    (tmp_path / "src" / "wiki").mkdir()
    schema = pa.schema([("text", pa.string())])
    pq.ParquetWriter(tmp_path / "src" / "wiki" / "a.parquet", schema).close()
    with pytest.raises(DataError, match=r"files of source wiki hold no documents"):
        plan_sources(config)


# ------------------------------------------------------------------ real text and tokenizer


def test_real_text_with_a_real_tokenizer(shared_data: Path, tmp_path: Path) -> None:
    tokenizer = TokenizerConfig("sp", str(shared_data / "tokenizers/llama2/tokenizer.model"))
    src = shared_data / "text" / "tinystories"
    config = PrepareConfig(str(src), str(tmp_path), tokenizer, val_fraction=0.1)
    (manifest,) = prepare_sources(config)
    expected = pq.read_table(src)["text"].to_pylist()
    decode = build_tokenizer(tokenizer).decode
    found = [
        decode(d.tolist())
        for split in ("train", "val")
        for d in SourceReader(tmp_path / "tinystories", split).documents()
    ]
    assert Counter(found) == Counter(expected)
    assert manifest.train.text_bytes + manifest.val.text_bytes == sum(
        len(t.encode()) for t in expected
    )
