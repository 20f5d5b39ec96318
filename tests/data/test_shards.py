"""The shard format and its manifest: what is written is read back, by us and by plain Parquet."""

from __future__ import annotations

import hashlib
import json
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from modular_lm.data import shards
from modular_lm.data.manifest import (
    FILE,
    VERSION,
    InputFile,
    Manifest,
    Problems,
    Settings,
    Split,
    TokenizerId,
)
from modular_lm.data.shards import ShardFile, ShardWriter
from modular_lm.errors import DataError

SMALL = TokenizerId("bytes", "ab" * 32, 258)
LARGE = TokenizerId("tiktoken", "cd" * 32, 128_256)


@pytest.fixture(autouse=True)
def small_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of 8 tokens, 4 rows a group: borders everywhere."""
    monkeypatch.setattr(shards, "ROW_TOKENS", 8)
    monkeypatch.setattr(shards, "GROUP_ROWS", 4)


def documents(lengths: list[int], n_words: int = 258) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(1, n_words, n) for n in lengths]


def write(folder: Path, docs: list[np.ndarray], tokenizer: TokenizerId = SMALL) -> Manifest:
    with ShardWriter(folder / "train-00000.parquet", "train", tokenizer) as writer:
        for doc in docs:
            writer.add(doc, 2 * len(doc))
    return manifest(Split.of([writer.info]), tokenizer)


def manifest(train: Split, tokenizer: TokenizerId = SMALL) -> Manifest:
    return Manifest(
        source="wiki",
        tokenizer=tokenizer,
        dtype=tokenizer.dtype,
        row_tokens=shards.ROW_TOKENS,
        settings=Settings(42, 0.01, True, True, False, None),
        train=train,
        val=Split.of([]),
        duplicates={"train": 0, "val": 0},
        problems=Problems(empty=3),
        inputs=(InputFile("a.parquet", 17),),
        command="prepare src=ä",
    )


def open_shard(folder: Path, manifest: Manifest) -> ShardFile:
    return ShardFile(folder, manifest, "train", manifest.train.shards[0])


def tokens_of(shard: ShardFile, start: int, n: int, dtype: str) -> np.ndarray:
    out = np.zeros(n, dtype)
    shard.read_into(start, out.view(np.uint8).data)
    return out


@pytest.mark.parametrize("tokenizer", [SMALL, LARGE])
@pytest.mark.parametrize("lengths", [[1], [8], [32], [33], [3, 5, 100, 1, 1, 60], [64, 64]])
def test_round_trip(tokenizer: TokenizerId, lengths: list[int], tmp_path: Path) -> None:
    docs = documents(lengths, tokenizer.n_words)
    shard = open_shard(tmp_path, write(tmp_path, docs, tokenizer))
    stream = np.concatenate(docs)
    for start in range(0, len(stream), 7):
        for n in (1, len(stream) - start):
            expected = stream[start : start + n]
            assert np.array_equal(tokens_of(shard, start, n, tokenizer.dtype), expected)
    starts = np.concatenate(list(shard.document_starts()))
    assert starts.tolist() == np.cumsum([0, *lengths[:-1]]).tolist()
    shard.verify()


@pytest.mark.parametrize("tokenizer", [SMALL, LARGE])
def test_a_flipped_bit_is_named_by_the_reading_that_meets_it(
    tokenizer: TokenizerId, tmp_path: Path
) -> None:
    m = write(tmp_path, documents([100]), tokenizer)
    file = tmp_path / "train-00000.parquet"
    width = 8 * np.dtype(tokenizer.dtype).itemsize
    at = open_shard(tmp_path, m)._tokens_at[1] + width  # second row of the second group
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)
    shard = open_shard(tmp_path, m)
    for start, n in [(0, 40), (48, 52)]:
        assert len(tokens_of(shard, start, n, tokenizer.dtype)) == n
    for start, n in [(0, 41), (44, 1), (47, 53)]:
        with pytest.raises(DataError, match=r"train-00000\.parquet: row 5 differs .*CRC-32"):
            tokens_of(shard, start, n, tokenizer.dtype)


@pytest.mark.parametrize(("n_words", "dtype"), [(65_536, "uint16"), (65_537, "uint32")])
def test_the_vocabulary_decides_the_type(n_words: int, dtype: str, tmp_path: Path) -> None:
    tokenizer = TokenizerId("sp", "ab" * 32, n_words)
    last = np.array([n_words - 1, 0, n_words - 1])
    shard = open_shard(tmp_path, write(tmp_path, [last], tokenizer))
    assert tokenizer.dtype == dtype
    assert tokens_of(shard, 0, 3, dtype).tolist() == last.tolist()


def test_other_programs_can_read_a_shard(tmp_path: Path) -> None:
    write(tmp_path, documents([3, 5, 20, 9]))
    table = pq.read_table(tmp_path / "train-00000.parquet")
    rows = np.frombuffer(b"".join(table["tokens"].to_pylist()), "<u2").reshape(-1, 8)
    assert rows.shape == (5, 8)
    assert np.array_equal(rows.reshape(-1)[:37], np.concatenate(documents([3, 5, 20, 9])))
    assert not rows.reshape(-1)[37:].any()
    assert table["doc_starts"].to_pylist() == [[0, 3], [0], [], [4], []]
    assert table["crc32"].to_pylist() == [zlib.crc32(row) for row in table["tokens"].to_pylist()]
    footer = pq.read_metadata(tmp_path / "train-00000.parquet").metadata
    metadata = {k.decode(): v.decode() for k, v in footer.items()}
    assert metadata.pop("ARROW:schema")
    assert metadata == {
        "format": "modular-lm token shards",
        "version": str(VERSION),
        "split": "train",
        "tokenizer_hash": SMALL.content_hash,
        "dtype": "uint16",
        "row_tokens": "8",
        "tokens": "37",
    }


def test_info_describes_the_file(tmp_path: Path) -> None:
    (info,) = write(tmp_path, documents([3, 40])).train.shards
    data = (tmp_path / info.file).read_bytes()
    assert (info.documents, info.tokens, info.text_bytes) == (2, 43, 86)
    assert (info.size, info.sha256) == (len(data), hashlib.sha256(data).hexdigest())


def test_tokens_take_their_own_size_on_disk(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.undo()
    (info,) = write(tmp_path, documents([1000] * 2000)).train.shards
    assert info.size < 1.02 * 2 * info.tokens


def test_an_error_while_writing_leaves_no_file(tmp_path: Path) -> None:
    def interrupted() -> None:
        with ShardWriter(tmp_path / "train-00000.parquet", "train", SMALL) as writer:
            writer.add(np.arange(100), 100)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("n_words", "dtype"), [(258, "uint16"), (65536, "uint16"), (65537, "uint32")]
)
def test_dtype_is_the_smallest_that_holds_all_ids(n_words: int, dtype: str) -> None:
    assert TokenizerId("sp", "", n_words).dtype == dtype


# ------------------------------------------------------------------ damaged and foreign shards


def test_a_truncated_shard_is_named(tmp_path: Path) -> None:
    m = write(tmp_path, documents([100]))
    file = tmp_path / "train-00000.parquet"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(
        DataError, match=r"train-00000\.parquet: has [\d,]+ bytes, manifest.json says"
    ):
        open_shard(tmp_path, m)
    file.unlink()
    with pytest.raises(
        DataError, match=r"train-00000\.parquet: named in manifest.json but missing"
    ):
        open_shard(tmp_path, m)


def test_garbage_of_the_right_size_is_named(tmp_path: Path) -> None:
    m = write(tmp_path, documents([100]))
    (tmp_path / "train-00000.parquet").write_bytes(bytes(m.train.shards[0].size))
    with pytest.raises(DataError, match=r"train-00000\.parquet: not a readable parquet file"):
        open_shard(tmp_path, m)


def test_a_flipped_bit_is_found_by_verify(tmp_path: Path) -> None:
    m = write(tmp_path, documents([100]))
    file = tmp_path / "train-00000.parquet"
    whole = file.read_bytes()
    for at in range(0, len(whole), 97):
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(DataError, match=r"train-00000\.parquet: "):
            open_shard(tmp_path, m).verify()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"tokenizer": replace(SMALL, content_hash="ff")},
            "tokenizer_hash is abab.*manifest says ff",
        ),
        ({"dtype": "uint32"}, "dtype is uint16, the manifest says uint32"),
        ({"row_tokens": 16}, "row_tokens is 8, the manifest says 16"),
    ],
)
def test_a_shard_that_contradicts_the_manifest(change, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=rf"train-00000\.parquet: {message}"):
        open_shard(tmp_path, replace(write(tmp_path, documents([100])), **change))


def test_a_shard_of_the_other_split(tmp_path: Path) -> None:
    m = write(tmp_path, documents([100]))
    with pytest.raises(DataError, match="split is train, the manifest says val"):
        ShardFile(tmp_path, m, "val", m.train.shards[0])


def test_a_shard_rewritten_with_compression(tmp_path: Path) -> None:
    m = write(tmp_path, documents([100]))
    file = tmp_path / "train-00000.parquet"
    table = pq.read_table(file)
    with pq.ParquetWriter(file, table.schema, compression="zstd") as writer:
        writer.write_table(table, row_group_size=4)
        writer.add_key_value_metadata({"tokens": "100"})
    info = replace(m.train.shards[0], size=file.stat().st_size)
    with pytest.raises(DataError, match="tokens are not stored plainly"):
        open_shard(tmp_path, manifest(Split.of([info])))


def test_a_shard_rewritten_without_a_column(tmp_path: Path) -> None:
    m = write(tmp_path, documents([100]))
    file = tmp_path / "train-00000.parquet"
    table = pq.read_table(file).drop_columns(["crc32"])
    with pq.ParquetWriter(file, table.schema, compression="none", use_dictionary=False) as writer:
        writer.write_table(table, row_group_size=4)
        writer.add_key_value_metadata({"tokens": "100"})
    info = replace(m.train.shards[0], size=file.stat().st_size)
    with pytest.raises(DataError, match=r"train-00000\.parquet: holds other columns"):
        open_shard(tmp_path, manifest(Split.of([info])))


def test_damaged_document_starts_are_named(tmp_path: Path) -> None:
    m = write(tmp_path, documents([3, 5, 20, 9]))
    file = tmp_path / "train-00000.parquet"
    chunk = pq.read_metadata(file).row_group(0).column(1)
    data = bytearray(file.read_bytes())
    data[chunk.data_page_offset + chunk.total_compressed_size - 1] ^= 1
    file.write_bytes(data)
    with pytest.raises(DataError, match=r"train-00000\.parquet: doc_starts cannot be read .*CRC"):
        list(open_shard(tmp_path, m).document_starts())


def test_a_closed_shard_opens_again(tmp_path: Path) -> None:
    docs = documents([100])
    shard = open_shard(tmp_path, write(tmp_path, docs))
    for _ in range(2):
        assert np.array_equal(tokens_of(shard, 30, 70, "uint16"), docs[0][30:])
        shard.close()
    (tmp_path / "train-00000.parquet").unlink()
    with pytest.raises(
        DataError, match=r"train-00000\.parquet: named in manifest.json but missing"
    ):
        tokens_of(shard, 0, 1, "uint16")


# ------------------------------------------------------------------ manifest


def test_manifest_round_trip(tmp_path: Path) -> None:
    m = write(tmp_path, documents([100, 3]))
    m.save(tmp_path)
    assert Manifest.load(tmp_path) == m
    assert sorted(f.name for f in tmp_path.iterdir()) == [FILE, "train-00000.parquet"]
    assert json.loads((tmp_path / FILE).read_text())["train"]["tokens"] == 103


def test_fingerprint_is_of_the_tokens_alone(tmp_path: Path) -> None:
    m = write(tmp_path, documents([100, 3]))
    assert replace(m, command="x", source="y", inputs=()).fingerprint == m.fingerprint
    other = Split.of([replace(m.train.shards[0], sha256="00")])
    assert replace(m, train=other).fingerprint != m.fingerprint
    assert replace(m, val=m.train, train=m.val).fingerprint != m.fingerprint


def edit(folder: Path, **changes) -> None:
    values = json.loads((folder / FILE).read_text())
    values.update(changes)
    (folder / FILE).write_text(json.dumps({k: v for k, v in values.items() if v is not None}))


def test_a_manifest_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no manifest.json, so not a prepared source"):
        Manifest.load(tmp_path)
    m = write(tmp_path, documents([100]))

    def load_after(message: str, **changes) -> None:
        m.save(tmp_path)
        edit(tmp_path, **changes)
        with pytest.raises(DataError, match=rf"manifest\.json: {message}"):
            Manifest.load(tmp_path)

    load_after("not a manifest of modular-lm", format="other")
    load_after(f"format version 9, this program reads {VERSION}", version=9)
    load_after("damaged .*'tokenizer'", tokenizer=None)
    load_after("damaged .*unexpected", more=1)
    load_after(
        "damaged: totals of train",
        train={**json.loads((tmp_path / FILE).read_text())["train"], "tokens": 1},
    )


@pytest.mark.parametrize("content", ["", '{"format": "modular-lm', "[]", "\x00\x01"])
def test_a_truncated_manifest(content: str, tmp_path: Path) -> None:
    (tmp_path / FILE).write_text(content)
    with pytest.raises(DataError, match=r"manifest\.json: (damaged|not a manifest)"):
        Manifest.load(tmp_path)
