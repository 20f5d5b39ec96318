"""Documents out of files: parquet, JSON lines, and JSON lines compressed by gzip or zstd.

A document is a text under the column or key `text`, else `content`. Files are read as streams, a
few pages or a buffer at a time, so memory does not grow with them. What can be wrong with a single
document is told to the caller, to be counted: a text that is missing (null, no such key, not a
string) comes as None, and one that was not valid Unicode comes repaired. What is wrong with a file
(unreadable, not JSON, no texts at all) is a DataError. What is done with the texts is up to the
caller.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from modular_lm.errors import DataError, reason
from modular_lm.tokenizer import well_formed

SUFFIXES = (".parquet", ".jsonl", ".jsonl.gz", ".jsonl.zst")
TEXT_KEYS = ("text", "content")
_BATCH_BYTES = 4 << 20  # text held at a time from a parquet file
_BATCH_ROWS = 1024
_READ_BYTES = 1 << 20
_LOOKED_AT = 100  # records at the head of a file of which one must have a text
_UNPACKED = 4  # bytes of JSON lines per byte of .gz or .zst, about


@dataclass(frozen=True)
class Source:
    """Files that belong together under one name; `root` is what their names are relative to."""

    name: str
    root: Path
    files: tuple[Path, ...]


@dataclass(frozen=True)
class Part:
    """A part of a file that can be read by itself.

    row_groups: half-open range within a parquet file; None: the whole file.
    size: its bytes of text, about.
    """

    file: Path
    row_groups: tuple[int, int] | None
    size: int


class Document(NamedTuple):
    """A text and its UTF-8 bytes; repaired: what was not valid Unicode in it is now U+FFFD."""

    text: str
    data: bytes
    repaired: bool


def find_sources(src: Path) -> list[Source]:
    """The sources below `src`, sorted by name.

    A file is one source; a folder that holds document files is one; a folder of such folders
    (each searched to any depth) holds one per folder. Names that start with `.` or `_` are skipped.
    Raises DataError if there are none.
    """
    src = src.expanduser().resolve()
    if src.is_file():
        if not src.name.endswith(SUFFIXES):
            raise DataError(f"src={src}: expected a file of {_endings()}")
        return [Source(_stem(src), src.parent, (src,))]
    if not src.is_dir():
        raise DataError(f"src={src}: no such file or folder")
    own = tuple(f for f in _visible(src) if f.is_file() and f.name.endswith(SUFFIXES))
    folders = [(d, tuple(_documents_below(d))) for d in _visible(src) if d.is_dir()]
    below = [Source(d.name, d, files) for d, files in folders if files]
    if own and below:
        raise DataError(
            f"src={src}: holds document files ({own[0].name}) and folders of them "
            f"({below[0].name}): name one of the two, or move the files into a folder"
        )
    if not own and not below:
        raise DataError(f"src={src}: no files of {_endings()} in it or in its folders")
    return [Source(src.name, src, own)] if own else below


def split_file(file: Path, part_bytes: int) -> list[Part]:
    """Cut a file into parts of about `part_bytes`: parquet between row groups, others not at all.

    Reads only the parquet footer or the first records: enough to raise DataError for a file that is
    empty of meaning (broken, or without texts) before any work is started.
    """
    if file.suffix != ".parquet":
        _check_records(file)
        unpacked = 1 if file.suffix == ".jsonl" else _UNPACKED
        return [Part(file, None, file.stat().st_size * unpacked)]
    with _open_parquet(file) as parquet:
        column = _text_column(file, parquet)
        sizes = [_group_bytes(parquet, g, column) for g in range(parquet.num_row_groups)]
    parts, start, size = [], 0, 0
    for group, group_bytes in enumerate(sizes):
        size += group_bytes
        if size >= part_bytes or group == len(sizes) - 1:
            parts.append(Part(file, (start, group + 1), size))
            start, size = group + 1, 0
    return parts


def group_parts(parts: Iterable[Part], slice_bytes: int) -> Iterator[tuple[Part, ...]]:
    """Join parts, in their order, until each group has about `slice_bytes`."""
    group, size = list[Part](), 0
    for part in parts:
        group.append(part)
        size += part.size
        if size >= slice_bytes:
            yield tuple(group)
            group, size = [], 0
    if group:
        yield tuple(group)


def read_documents(part: Part) -> Iterator[Document | None]:
    """The documents of a part in order; None for a missing text.

    Raises DataError that names the file and the line or row group that cannot be read.
    """
    if part.row_groups is None:
        return _json_documents(part.file)
    return _parquet_documents(part.file, range(*part.row_groups))


def _repaired(data: bytes) -> Document:
    text = data.decode("utf-8", "replace")
    return Document(text, text.encode(), True)


# ------------------------------------------------------------------ parquet


def _open_parquet(file: Path) -> pq.ParquetFile:
    try:
        # Buffered: else a column of a whole row group is held, however large.
        return pq.ParquetFile(file, buffer_size=_READ_BYTES, pre_buffer=False)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{file}: not a readable parquet file: {reason(error)}") from error


def _text_column(file: Path, parquet: pq.ParquetFile) -> str:
    schema = parquet.schema_arrow
    column = next((key for key in TEXT_KEYS if key in schema.names), None)
    if column is None:
        found = ", ".join(schema.names)
        raise DataError(f"{file}: no column `text` or `content`, only {found}")
    kind = schema.field(column).type
    value = kind.value_type if pa.types.is_dictionary(kind) else kind
    if not any(is_text(value) for is_text in _TEXT_TYPES):
        raise DataError(f"{file}: column `{column}` holds {kind}, expected text")
    return column


# A column of which every value is null has the type null.
_TEXT_TYPES = (
    pa.types.is_string,
    pa.types.is_large_string,
    pa.types.is_string_view,
    pa.types.is_binary,
    pa.types.is_large_binary,
    pa.types.is_binary_view,
    pa.types.is_null,
)


def _group_bytes(parquet: pq.ParquetFile, group: int, column: str) -> int:
    row_group = parquet.metadata.row_group(group)
    chunks = (row_group.column(i) for i in range(row_group.num_columns))
    return next(c.total_uncompressed_size for c in chunks if c.path_in_schema == column)


def _parquet_documents(file: Path, groups: range) -> Iterator[Document | None]:
    with _open_parquet(file) as parquet:
        column = _text_column(file, parquet)
        for group in groups:
            rows = parquet.metadata.row_group(group).num_rows
            most = _BATCH_BYTES * rows // max(1, _group_bytes(parquet, group, column))
            batches = parquet.iter_batches(
                max(1, min(most, _BATCH_ROWS)),
                row_groups=[group],
                columns=[column],
                use_threads=False,  # a task has one core
            )
            try:
                for batch in batches:
                    yield from map(_parquet_document, _as_bytes(batch.column(0)))
            except (pa.ArrowException, OSError) as error:
                raise DataError(f"{file}: row group {group}: {reason(error)}") from error


def _as_bytes(column: pa.Array) -> list[bytes | None]:
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    return column.cast(pa.large_binary()).to_pylist()


def _parquet_document(data: bytes | None) -> Document | None:
    if data is None:
        return None
    try:
        return Document(data.decode(), data, False)
    except UnicodeDecodeError:
        return _repaired(data)


# ------------------------------------------------------------------ JSON lines


def _json_documents(file: Path) -> Iterator[Document | None]:
    for record, whole in _records(file):
        text = next((record[k] for k in TEXT_KEYS if k in record), None)
        if not isinstance(text, str):
            yield None
            continue
        good = well_formed(text)
        # The bytes that were not valid may have been those of another key.
        repaired = good is not text or (not whole and "\ufffd" in text)
        yield Document(good, good.encode(), repaired)


def _check_records(file: Path) -> None:
    """Raise DataError if none of the first records can hold a text: a file of something else."""
    seen = []
    for record, _ in islice(_records(file), _LOOKED_AT):
        key = next((k for k in TEXT_KEYS if k in record), None)
        if key and isinstance(record[key], str | None):
            return
        seen.append((key, record))
    if not seen:
        return
    where = f"{file}: none of the first {len(seen)} records has a text: the first"
    key, record = seen[0]
    if key is None:
        raise DataError(f"{where} has no key `text` or `content`, only {', '.join(record)}")
    raise DataError(f"{where} has {type(record[key]).__name__} under `{key}`")


def _records(file: Path) -> Iterator[tuple[dict[str, Any], bool]]:
    """The objects of a file, each with whether its line was valid UTF-8."""
    number = 0
    try:
        # pyarrow's decompressors notice a file that was cut short; zstandard's stream does not.
        compression = {".gz": "gzip", ".zst": "zstd"}.get(file.suffix)
        with pa.input_stream(str(file), compression=compression) as stream:
            lines = io.BufferedReader(stream, _READ_BYTES)  # type: ignore[arg-type]
            for number, line in enumerate(lines, start=1):
                if not line.isspace():
                    yield _record(file, number, line)
    except OSError as error:
        raise DataError(f"{file}: after line {number}: {reason(error)}") from error


def _record(file: Path, number: int, line: bytes) -> tuple[dict[str, Any], bool]:
    whole = True
    try:
        try:
            record: Any = json.loads(line)
        except UnicodeDecodeError:
            record, whole = json.loads(line.decode("utf-8", "replace")), False
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file}:{number}: not a line of JSON: {reason(error)}") from error
    if not isinstance(record, dict):
        raise DataError(f"{file}:{number}: expected an object with the key `text` or `content`")
    return record, whole


# ------------------------------------------------------------------ names


def _visible(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if not p.name.startswith((".", "_")))


def _documents_below(folder: Path) -> Iterator[Path]:
    for path in _visible(folder):
        if path.is_dir():
            yield from _documents_below(path)
        elif path.name.endswith(SUFFIXES):
            yield path


def _stem(file: Path) -> str:
    return next(file.name.removesuffix(s) for s in SUFFIXES if file.name.endswith(s))


def _endings() -> str:
    return ", ".join(SUFFIXES[:-1]) + " or " + SUFFIXES[-1]
