"""Documents: every format gives the same texts, and what is broken is named."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from modular_lm.data.documents import Slice, find_sources, read_texts, split_file
from modular_lm.errors import DataError

TEXTS = ["one", "", "zwei ½ 🙂\n\nzwei", "x" * 5000]


def lines_of(texts: list[str | None], key: str = "text") -> bytes:
    return b"".join(json.dumps({"id": 1, key: t}).encode() + b"\n" for t in texts)


def write(file: Path, texts: list[str | None], key: str = "text") -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".parquet":
        table = pa.table({"id": list(range(len(texts))), key: pa.array(texts, pa.string())})
        pq.write_table(table, file, row_group_size=2, compression="zstd")
    else:
        pack = {".jsonl": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}[file.suffix]
        file.write_bytes(pack(lines_of(texts, key)))
    return file


def read_all(file: Path) -> list[str]:
    return [text for part in split_file(file, 1 << 20) for text in read_texts(part)]


@pytest.mark.parametrize("key", ["text", "content"])
@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl", "a.jsonl.gz", "a.jsonl.zst"])
def test_every_format_gives_the_texts(name: str, key: str, tmp_path: Path) -> None:
    assert read_all(write(tmp_path / name, [*TEXTS, None], key)) == [*TEXTS, ""]


def test_text_goes_before_content(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"content": "no", "text": "yes"}\n\n{"content": "only"}')
    assert read_all(file) == ["yes", "only"]


@pytest.mark.parametrize("pack", [gzip.compress, zstandard.compress])
def test_files_of_several_compressed_frames(pack, tmp_path: Path) -> None:
    file = tmp_path / ("a.jsonl.gz" if pack is gzip.compress else "a.jsonl.zst")
    file.write_bytes(pack(lines_of(["a"])) + pack(lines_of(["b"])))
    assert read_all(file) == ["a", "b"]


def test_lone_surrogates_are_replaced(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "a\\ud800b"}\n')
    assert read_all(file) == ["a\ufffdb"]


def test_slices_cover_a_parquet_file_once(tmp_path: Path) -> None:
    texts = [f"text {i}" for i in range(11)]
    file = write(tmp_path / "a.parquet", list(texts))
    slices = split_file(file, 1)
    assert [s.row_groups for s in slices] == [(i, i + 1) for i in range(6)]
    assert [t for s in slices for t in read_texts(s)] == texts
    assert len(split_file(file, 1 << 30)) == 1


# ------------------------------------------------------------------ finding sources


def test_a_file_is_a_source(tmp_path: Path) -> None:
    (source,) = find_sources(write(tmp_path / "wiki.jsonl.gz", ["a"]))
    assert (source.name, source.files) == ("wiki", (tmp_path / "wiki.jsonl.gz",))


def test_a_folder_of_files_is_one_source(tmp_path: Path) -> None:
    for name in ("b.parquet", "a.jsonl.zst", "README.md", ".hidden.jsonl"):
        (tmp_path / name).write_bytes(b"")
    (source,) = find_sources(tmp_path)
    assert source.name == tmp_path.name
    assert [f.name for f in source.files] == ["a.jsonl.zst", "b.parquet"]


def test_a_folder_of_folders_holds_one_source_each(tmp_path: Path) -> None:
    for name in (
        "wiki/b.jsonl",
        "wiki/deep/er/a.jsonl",
        "books/1.parquet",
        "_tmp/x.jsonl",
        "e/f.txt",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    books, wiki = find_sources(tmp_path)
    assert (books.name, wiki.name) == ("books", "wiki")
    assert [str(f.relative_to(wiki.root)) for f in wiki.files] == ["b.jsonl", "deep/er/a.jsonl"]


@pytest.mark.parametrize(
    ("files", "src", "message"),
    [
        ([], "nothing", r"src=.*nothing: no such file or folder"),
        (["a.csv"], "a.csv", r"src=.*a\.csv: expected a file of \.parquet, .* or \.jsonl\.zst"),
        (["d/a.csv"], "d", r"src=.*d: no files of \.parquet"),
        (
            ["d/a.jsonl", "d/wiki/b.jsonl"],
            "d",
            r"holds document files \(a\.jsonl\) and folders.*wiki",
        ),
    ],
)
def test_no_sources(files: list[str], src: str, message: str, tmp_path: Path) -> None:
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    with pytest.raises(DataError, match=message):
        find_sources(tmp_path / src)


# ------------------------------------------------------------------ broken files


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "a"', r"a\.jsonl:3: not a line of JSON"),
        (b'{"text": "\xff"}', r"a\.jsonl:3: not a line of JSON"),
        (b'["text"]', r"a\.jsonl:3: expected an object with the key `text` or `content`"),
        (b'{"body": "a", "id": 1}', r"a\.jsonl:3: no key `text` or `content`, only body, id"),
        (b'{"text": 5}', r"a\.jsonl:3: `text` holds int, expected text"),
    ],
)
def test_a_broken_line_is_named(line: bytes, message: str, tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(lines_of(["a", "b"]) + line + b"\n" + lines_of(["c"]))
    texts = read_texts(Slice(file, None, 0))
    assert [next(texts), next(texts)] == ["a", "b"]
    with pytest.raises(DataError, match=message) as e:
        next(texts)
    assert "\n" not in str(e.value)


def test_a_broken_first_line_is_found_without_reading_on(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(b"hello\n")
    with pytest.raises(DataError, match=r"a\.jsonl:1: not a line of JSON"):
        split_file(file, 1)


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst"])
@pytest.mark.parametrize("damage", ["cut", "foreign"])
def test_damaged_compression_is_noticed(name: str, damage: str, tmp_path: Path) -> None:
    file = write(tmp_path / name, [f"{i} {i * i}" for i in range(5000)])
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2] if damage == "cut" else b"plain text" * 100)
    with pytest.raises(DataError, match=rf"{name}: after line \d+: \w+"):
        list(read_texts(Slice(file, None, 0)))


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (None, r"a\.parquet: not a readable parquet file"),
        (
            {"body": ["a"], "url": ["b"]},
            r"a\.parquet: no column `text` or `content`, only body, url",
        ),
        ({"text": [1, 2]}, r"a\.parquet: column `text` holds int64, expected text"),
    ],
)
def test_an_unusable_parquet_file(table: dict | None, message: str, tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    if table is None:
        file.write_bytes(b"PAR1 nothing more")
    else:
        pq.write_table(pa.table(table), file)
    with pytest.raises(DataError, match=message) as e:
        split_file(file, 1)
    assert "\n" not in str(e.value)


def test_a_damaged_row_group_is_named(tmp_path: Path) -> None:
    file = write(tmp_path / "a.parquet", [f"{i} " * 500 for i in range(6)])
    chunk = pq.read_metadata(file).row_group(1).column(1)
    start = chunk.dictionary_page_offset or chunk.data_page_offset
    data = bytearray(file.read_bytes())
    data[start : start + chunk.total_compressed_size] = bytes(chunk.total_compressed_size)
    file.write_bytes(data)
    with pytest.raises(DataError, match=r"a\.parquet: row group 1: "):
        read_all(file)
