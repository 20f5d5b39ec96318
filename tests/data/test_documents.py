"""Documents: every format gives the same texts, problems are told, what is broken is named."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from modular_lm.data.documents import (
    Document,
    Part,
    find_sources,
    group_parts,
    read_documents,
    split_file,
)
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


def documents_of(file: Path) -> list[Document | None]:
    return [document for part in split_file(file, 1 << 20) for document in read_documents(part)]


def read_all(file: Path) -> list[str | None]:
    documents = documents_of(file)
    assert all(d is None or d.data == d.text.encode() for d in documents)
    return [d and d.text for d in documents]


@pytest.mark.parametrize("key", ["text", "content"])
@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl", "a.jsonl.gz", "a.jsonl.zst"])
def test_every_format_gives_the_texts(name: str, key: str, tmp_path: Path) -> None:
    assert read_all(write(tmp_path / name, [*TEXTS, None], key)) == [*TEXTS, None]


def test_text_goes_before_content(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"content": "no", "text": "yes"}\n\n{"content": "only"}')
    assert read_all(file) == ["yes", "only"]


@pytest.mark.parametrize("pack", [gzip.compress, zstandard.compress])
def test_files_of_several_compressed_frames(pack, tmp_path: Path) -> None:
    file = tmp_path / ("a.jsonl.gz" if pack is gzip.compress else "a.jsonl.zst")
    file.write_bytes(pack(lines_of(["a"])) + pack(lines_of(["b"])))
    assert read_all(file) == ["a", "b"]


def test_parts_cover_a_parquet_file_once(tmp_path: Path) -> None:
    texts = [f"text {i}" for i in range(11)]
    file = write(tmp_path / "a.parquet", list(texts))
    parts = split_file(file, 1)
    assert [p.row_groups for p in parts] == [(i, i + 1) for i in range(6)]
    assert [d and d.text for p in parts for d in read_documents(p)] == texts
    (whole,) = split_file(file, 1 << 30)
    assert whole.size == sum(p.size for p in parts)


def test_small_parts_are_grouped() -> None:
    parts = [Part(Path(str(i)), None, size) for i, size in enumerate([3, 3, 3, 9, 1, 1])]
    assert [[p.size for p in group] for group in group_parts(parts, 5)] == [[3, 3], [3, 9], [1, 1]]


# ------------------------------------------------------------------ problems of single documents


@pytest.mark.parametrize("encoded", [b'"a\\ud800b"', b'"a\xffb"', b'"a\xed\xa0\x80b"'])
def test_what_is_not_unicode_in_json_is_repaired(encoded: bytes, tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'{"text": ' + encoded + b'}\n{"url": "\xff", "text": "good"}\n')
    bad, good = documents_of(file)
    assert bad is not None
    assert bad.repaired
    assert bad.text.replace("\ufffd", "") == "ab"
    assert good == Document("good", b"good", False)


VALUES = pa.array([b"zwei \xc2\xbd", b"a\xff\xffb", None, b"", b"n\0l"], pa.binary())
# By `view`, as a cast to text would refuse what is not UTF-8.
COLUMNS = [
    VALUES,
    VALUES.cast(pa.large_binary()),
    VALUES.cast(pa.binary_view()),
    VALUES.view(pa.string()),
    VALUES.cast(pa.large_binary()).view(pa.large_string()),
    VALUES.view(pa.string()).cast(pa.string_view()),
    VALUES.view(pa.string()).dictionary_encode(),
]


@pytest.mark.parametrize("column", COLUMNS, ids=lambda column: str(column.type))
def test_every_kind_of_text_column(column: pa.Array, tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    found = documents_of(tmp_path / "a.parquet")
    assert [d and d.text for d in found] == ["zwei ½", "a\ufffd\ufffdb", None, "", "n\0l"]
    assert [d and d.repaired for d in found] == [False, True, None, False, False]


def test_texts_that_are_missing(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    records = [{"text": None}, {"id": 1}, {"text": 5}, {"text": ["a"]}, {}, {"content": "yes"}]
    file.write_text("".join(json.dumps(r) + "\n" for r in records))
    assert read_all(file) == [*[None] * 5, "yes"]
    pq.write_table(pa.table({"text": pa.array([None, None])}), tmp_path / "a.parquet")
    assert read_all(tmp_path / "a.parquet") == [None, None]


def test_large_documents_are_read_few_at_a_time(tmp_path: Path) -> None:
    texts = [f"{i % 10} " * 600_000 for i in range(30)]
    file = tmp_path / "a.parquet"
    # One row group, of many pages: a page is what Parquet cannot split.
    pq.write_table(pa.table({"text": texts}), file, use_dictionary=False, write_batch_size=1)
    pa.default_memory_pool().release_unused()
    before = pa.total_allocated_bytes()
    most = 0
    for document, text in zip(documents_of_stream(file), texts, strict=True):
        most = max(most, pa.total_allocated_bytes() - before)
        assert document is not None
        assert document.text == text
    assert most < sum(map(len, texts)) / 2


def documents_of_stream(file: Path):
    for part in split_file(file, 1 << 30):
        yield from read_documents(part)


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
        (b"\xff\xfe", r"a\.jsonl:3: not a line of JSON"),
        (b'["text"]', r"a\.jsonl:3: expected an object with the key `text` or `content`"),
    ],
)
def test_a_broken_line_is_named(line: bytes, message: str, tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(lines_of(["a", "b"]) + line + b"\n" + lines_of(["c"]))
    documents = read_documents(Part(file, None, 0))
    assert [next(documents), next(documents)] == [Document(t, t.encode(), False) for t in "ab"]
    with pytest.raises(DataError, match=message) as e:
        next(documents)
    assert "\n" not in str(e.value)


def test_a_broken_first_line_is_found_without_reading_on(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(b"hello\n")
    with pytest.raises(DataError, match=r"a\.jsonl:1: not a line of JSON"):
        split_file(file, 1)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"body": "a", "id": 1}, r"the first has no key `text` or `content`, only body, id"),
        ({"text": 5}, r"the first has int under `text`"),
    ],
)
def test_records_of_something_else(record: dict, message: str, tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text((json.dumps(record) + "\n") * 99)
    with pytest.raises(
        DataError, match=r"a\.jsonl: none of the first 99 records has a text: " + message
    ):
        split_file(file, 1)
    with file.open("a") as stream:
        stream.write('{"text": null}\n')
    assert read_all(file) == [None] * 100


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst"])
@pytest.mark.parametrize("damage", ["cut", "foreign"])
def test_damaged_compression_is_noticed(name: str, damage: str, tmp_path: Path) -> None:
    file = write(tmp_path / name, [f"{i} {i * i}" for i in range(5000)])
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2] if damage == "cut" else b"plain text" * 100)
    with pytest.raises(DataError, match=rf"{name}: after line \d+: \w+"):
        list(read_documents(Part(file, None, 0)))


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (b"PAR1 nothing more", r"a\.parquet: not a readable parquet file"),
        (b"PAR1" + b"\xff" * 60 + b"\x28\0\0\0PAR1", r"a\.parquet: not a readable parquet file"),
        (
            {"body": ["a"], "url": ["b"]},
            r"a\.parquet: no column `text` or `content`, only body, url",
        ),
        ({"text": [1, 2]}, r"a\.parquet: column `text` holds int64, expected text"),
    ],
)
def test_an_unusable_parquet_file(table: dict | bytes, message: str, tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    if isinstance(table, bytes):
        file.write_bytes(table)
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
