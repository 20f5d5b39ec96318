"""Samples and documents equal those of the concatenated stream, whatever borders lie between."""

from __future__ import annotations

import os
import pickle
import tempfile
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modular_lm.config import TokenizerConfig
from modular_lm.data import reader as reader_module
from modular_lm.data import shards
from modular_lm.data.manifest import FILE, Manifest, Problems, Settings, Split, TokenizerId
from modular_lm.data.reader import SourceReader, open_sources
from modular_lm.data.shards import ShardFile, ShardWriter
from modular_lm.errors import ConfigError, DataError
from modular_lm.tokenizer import build_tokenizer

BYTES = build_tokenizer(TokenizerConfig())
BYTES_ID = TokenizerId.of(BYTES)
Docs = list[np.ndarray]


@pytest.fixture(autouse=True)
def small_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of 8 tokens, 4 rows a group: borders everywhere."""
    monkeypatch.setattr(shards, "ROW_TOKENS", 8)
    monkeypatch.setattr(shards, "GROUP_ROWS", 4)


def make_source(folder: Path, lengths: list[list[int]], tokenizer: TokenizerId = BYTES_ID) -> Docs:
    """A source with one train shard per list of document lengths; returns all documents."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    infos, docs = [], []
    for number, shard in enumerate(lengths):
        with ShardWriter(folder / f"train-{number:05d}.parquet", "train", tokenizer) as writer:
            for n in shard:
                docs.append(rng.integers(0, tokenizer.n_words, n))
                writer.add(docs[-1], n)
        infos.append(writer.info)
    Manifest(
        source=folder.name,
        tokenizer=tokenizer,
        dtype=tokenizer.dtype,
        row_tokens=shards.ROW_TOKENS,
        settings=Settings(1, 0.0, False, False, False, None),
        train=Split.of(infos),
        val=Split.of([]),
        duplicates={"train": 0, "val": 0},
        problems=Problems(),
        inputs=(),
        command="",
    ).save(folder)
    return docs


@settings(deadline=None, max_examples=60)
@given(
    lengths=st.lists(st.lists(st.integers(1, 90), min_size=1, max_size=6), min_size=1, max_size=4),
    seq_len=st.integers(1, 120),
    large=st.booleans(),
    seed=st.integers(0, 99),
)
def test_windows_are_cuts_of_the_stream(
    lengths: list[list[int]], seq_len: int, large: bool, seed: int
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = TokenizerId("sp", "00", 100_000) if large else BYTES_ID
        docs = make_source(Path(folder), lengths, tokenizer)
        stream = np.concatenate(docs)
        reader = SourceReader(Path(folder))
        n = reader.n_windows(seq_len)
        assert n == (len(stream) - 1) // seq_len
        positions = np.random.default_rng(seed).integers(0, n, 2 * n) if n else np.zeros(0, int)
        windows = reader.windows(positions, seq_len)
        assert windows.shape == (len(positions), seq_len + 1)
        assert windows.dtype == reader.manifest.dtype
        for position, window in zip(positions, windows, strict=True):
            start = position * seq_len
            assert np.array_equal(window, stream[start : start + seq_len + 1])
        found = list(reader.documents())
        assert [d.tolist() for d in found] == [d.tolist() for d in docs]


def test_neighbouring_samples_share_one_token(tmp_path: Path) -> None:
    make_source(tmp_path, [[50], [50]])
    windows = SourceReader(tmp_path).windows(np.arange(9), 11)
    assert np.array_equal(windows[:-1, -1], windows[1:, 0])


def test_windows_beyond_the_end_are_refused(tmp_path: Path) -> None:
    make_source(tmp_path, [[50]])
    reader = SourceReader(tmp_path)
    assert reader.n_windows(7) == 7  # 50 tokens hold 49 targets
    assert reader.n_windows(50) == 0
    for bad in (7, -1):
        with pytest.raises(IndexError, match=r"positions outside of 0\.\.6"):
            reader.windows(np.array([0, bad]), 7)


def test_the_first_documents(tmp_path: Path) -> None:
    docs = make_source(tmp_path, [[5, 40, 1], [70, 2]])
    reader = SourceReader(tmp_path)
    assert reader.n_documents == 5
    for n in (0, 1, 3, 4, 99):
        assert [len(d) for d in reader.documents(n)] == [len(d) for d in docs[:n]]


def test_an_empty_split(tmp_path: Path) -> None:
    make_source(tmp_path, [[50]])
    reader = SourceReader(tmp_path, "val")
    assert (reader.n_tokens, reader.n_windows(8), list(reader.documents())) == (0, 0, [])
    assert reader.windows(np.zeros(0, np.int64), 8).shape == (0, 9)


def test_a_reader_can_be_pickled_after_use(tmp_path: Path) -> None:
    make_source(tmp_path, [[50], [60]])
    reader = SourceReader(tmp_path)
    windows = reader.windows(np.arange(5), 20)
    copy = pickle.loads(pickle.dumps(reader))
    assert np.array_equal(copy.windows(np.arange(5), 20), windows)


def test_a_source_that_was_prepared_again_is_noticed(tmp_path: Path) -> None:
    make_source(tmp_path, [[50], [60]])
    pickled = pickle.dumps(SourceReader(tmp_path))
    make_source(tmp_path, [[50], [60]])
    pickle.loads(pickled)  # the same tokens again
    make_source(tmp_path, [[60], [50]])
    with pytest.raises(DataError, match=r": has been prepared again since this run began"):
        pickle.loads(pickled)


def test_unpickling_gives_the_same_reader_while_the_manifest_is_the_same(tmp_path: Path) -> None:
    make_source(tmp_path, [[50], [60]])
    pickled = pickle.dumps(SourceReader(tmp_path))
    reader = pickle.loads(pickled)
    assert pickle.loads(pickled) is reader
    assert pickle.loads(pickle.dumps(SourceReader(tmp_path, "val"))) is not reader
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(pickle.loads, pickled).result() is not reader
    make_source(tmp_path, [[50], [60]])
    assert pickle.loads(pickled) is not reader
    (tmp_path / FILE).unlink()
    with pytest.raises(DataError, match=r"no manifest\.json"):
        pickle.loads(pickled)


def test_neighbours_are_read_together_up_to_a_bound(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader_module, "_RUN_ROWS", 10)
    docs = make_source(tmp_path, [[999]])
    read: list[tuple[int, int]] = []
    read_rows = ShardFile.read_rows

    def spy(self: ShardFile, first: int, out: memoryview) -> None:
        read.append((first, len(out) // 16))
        read_rows(self, first, out)

    monkeypatch.setattr(ShardFile, "read_rows", spy)
    windows = SourceReader(tmp_path).windows(np.array([30, 0, 1, 2, 1, 29, 89]), 11)
    assert np.array_equal(windows[:, :-1], docs[0][:990].reshape(-1, 11)[[30, 0, 1, 2, 1, 29, 89]])
    assert read == [(0, 5), (39, 4), (122, 2)]
    read.clear()
    SourceReader(tmp_path).windows(np.arange(90), 11)
    assert all(n <= 12 for _, n in read)
    assert sum(n for _, n in read) <= 125 + 2 * len(read)


def test_each_piece_of_a_file_is_fetched_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "_PIECE", 256)
    make_source(tmp_path, [[2000]])
    asked: list[tuple[int, int]] = []

    def spy(handle: int, at: int, n: int, advice: int) -> None:
        if advice == os.POSIX_FADV_WILLNEED:
            asked.append((at, n))

    monkeypatch.setattr(os, "posix_fadvise", spy)
    reader = SourceReader(tmp_path)
    for _ in range(2):
        reader.windows(np.arange(90, 100), 10)
    assert len(asked) == len({*asked}) <= 3
    reader.windows(np.arange(199), 10)
    assert len(asked) == len({*asked})
    assert all(at % 256 == 0 and n == 256 for at, n in asked)
    before = len(asked)
    monkeypatch.setattr(shards, "_REMEMBERED_S", 0.0)
    reader.windows(np.arange(199), 10)
    assert len(asked) > before
    assert {*asked[before:]} == {*asked}


def test_few_files_stay_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader_module, "_MAX_OPEN", 3)
    monkeypatch.setattr(SourceReader, "_all", weakref.WeakSet())
    docs = make_source(tmp_path, [[20]] * 12)
    before = len(os.listdir("/proc/self/fd"))
    reader = SourceReader(tmp_path)
    for _ in range(2):
        windows = reader.windows(np.arange(11), 20)
        assert np.array_equal(windows[:, :-1].reshape(-1), np.concatenate(docs)[:220])
    assert len(os.listdir("/proc/self/fd")) <= before + 3
    other = SourceReader(tmp_path)
    for _ in range(2):
        for shared in (reader, other):
            shared.windows(np.arange(11), 20)
    assert len(os.listdir("/proc/self/fd")) <= before + 3
    del reader, other, shared
    assert len(os.listdir("/proc/self/fd")) <= before


def test_verify_names_the_damaged_shard(tmp_path: Path) -> None:
    make_source(tmp_path, [[50], [60]])
    SourceReader(tmp_path).verify()
    file = tmp_path / "train-00001.parquet"
    data = bytearray(file.read_bytes())
    data[40] ^= 1
    file.write_bytes(data)
    with pytest.raises(DataError, match=r"train-00001\.parquet: row 0 differs"):
        SourceReader(tmp_path).verify()


def test_a_file_cut_short_while_it_is_read(tmp_path: Path) -> None:
    make_source(tmp_path, [[500]])
    reader = SourceReader(tmp_path)
    reader.windows(np.array([0]), 20)
    os.truncate(tmp_path / "train-00000.parquet", 100)
    with pytest.raises(DataError, match=r"train-00000\.parquet: ends too early"):
        reader.windows(np.array([20]), 20)


# ------------------------------------------------------------------ open_sources


def test_sources_are_found(tmp_path: Path) -> None:
    make_source(tmp_path / "wiki", [[50]])
    make_source(tmp_path / "web", [[50]])
    folders = open_sources(str(tmp_path), ["web", "wiki"], BYTES)
    assert folders == {"web": tmp_path / "web", "wiki": tmp_path / "wiki"}


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    make_source(tmp_path / "wiki", [[50]])
    (tmp_path / "raw").mkdir()
    with pytest.raises(ConfigError, match=r"data\.root_dir=null: data\.sources\.wiki needs"):
        open_sources(None, ["wiki"], BYTES)
    with pytest.raises(ConfigError, match=r"data\.root_dir=there: data\.sources names nothing"):
        open_sources("there", [], BYTES)
    with pytest.raises(ConfigError, match=r"data\.root_dir=no/such: no such folder; prepare it"):
        open_sources("no/such", ["wiki"], BYTES)
    with pytest.raises(ConfigError, match=r"data\.sources\.wkii: no such .* did you mean wiki\?"):
        open_sources(tmp_path, ["wkii"], BYTES)
    with pytest.raises(ConfigError, match=r"data\.sources\.zzz: no such .* there are: wiki$"):
        open_sources(tmp_path, ["zzz"], BYTES)
    with pytest.raises(DataError, match=r"raw: no manifest\.json, so not a prepared source"):
        open_sources(tmp_path, ["raw"], BYTES)


def test_shards_of_another_tokenizer_are_refused(tmp_path: Path) -> None:
    make_source(tmp_path / "wiki", [[50]], TokenizerId("sp", "12" * 32, 32_000))
    with pytest.raises(
        DataError,
        match=r"data\.sources\.wiki: .*\(sp, 32000 tokens, 121212.* than data\.tokenizer \(bytes",
    ):
        open_sources(tmp_path, ["wiki"], BYTES)


def test_a_missing_shard_is_noticed_at_once(tmp_path: Path) -> None:
    make_source(tmp_path / "wiki", [[50], [60]])
    (tmp_path / "wiki" / "train-00001.parquet").unlink()
    assert (tmp_path / "wiki" / FILE).exists()
    with pytest.raises(
        DataError, match=r"train-00001\.parquet: named in manifest.json but missing"
    ):
        open_sources(tmp_path, ["wiki"], BYTES)
