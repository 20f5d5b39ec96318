"""Documents out of files: parquet, JSON lines, and JSON lines compressed by gzip or zstd.

A document is a text under the column or key `text`, else `content`. Files are read as streams, a
row group or a buffer at a time, so memory does not grow with them. A missing (null) text is given
as "", for the caller to count. What is done with the texts is up to the caller.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from modular_lm.errors import DataError, reason
from modular_lm.tokenizer import well_formed

SUFFIXES = (".parquet", ".jsonl", ".jsonl.gz", ".jsonl.zst")
TEXT_KEYS = ("text", "content")
_BATCH = 256  # documents held at a time from a parquet file


@dataclass(frozen=True)
class Source:
    """Files that belong together under one name; `root` is what their names are relative to."""

    name: str
    root: Path
    files: tuple[Path, ...]


@dataclass(frozen=True)
class Slice:
    """A part of a file that can be read by itself.

    row_groups: half-open range within a parquet file; None: the whole file.
    size: its bytes on disk, about.
    """

    file: Path
    row_groups: tuple[int, int] | None
    size: int


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


def split_file(file: Path, slice_bytes: int) -> list[Slice]:
    """Cut a file into slices of about `slice_bytes`: parquet between row groups, others not at all.

    Reads only the parquet footer or the first line: enough to raise DataError for a file that is
    empty of meaning (broken, or without texts) before any work is started.
    """
    if file.suffix != ".parquet":
        next(_json_texts(file), None)
        return [Slice(file, None, file.stat().st_size)]
    parquet = _open_parquet(file)
    _text_column(file, parquet)
    slices, start, size = [], 0, 0
    for group in range(parquet.num_row_groups):
        size += _group_bytes(parquet, group)
        if size >= slice_bytes or group == parquet.num_row_groups - 1:
            slices.append(Slice(file, (start, group + 1), size))
            start, size = group + 1, 0
    return slices


def read_texts(part: Slice) -> Iterator[str]:
    """The texts of a slice in order, without lone surrogates; "" for a missing text.

    Raises DataError that names the file and the line or row group that cannot be read.
    """
    if part.row_groups is None:
        return _json_texts(part.file)
    return _parquet_texts(part.file, range(*part.row_groups))


# ------------------------------------------------------------------ parquet


def _open_parquet(file: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(file)
    except pa.ArrowException as error:
        raise DataError(f"{file}: not a readable parquet file: {reason(error)}") from error


def _text_column(file: Path, parquet: pq.ParquetFile) -> str:
    schema = parquet.schema_arrow
    column = next((key for key in TEXT_KEYS if key in schema.names), None)
    if column is None:
        found = ", ".join(schema.names)
        raise DataError(f"{file}: no column `text` or `content`, only {found}")
    kind = schema.field(column).type
    value = kind.value_type if pa.types.is_dictionary(kind) else kind
    if not (pa.types.is_string(value) or pa.types.is_large_string(value)):
        raise DataError(f"{file}: column `{column}` holds {kind}, expected text")
    return column


def _group_bytes(parquet: pq.ParquetFile, group: int) -> int:
    row_group = parquet.metadata.row_group(group)
    return sum(row_group.column(i).total_compressed_size for i in range(row_group.num_columns))


def _parquet_texts(file: Path, groups: range) -> Iterator[str]:
    parquet = _open_parquet(file)
    column = _text_column(file, parquet)
    for group in groups:
        batches = parquet.iter_batches(_BATCH, row_groups=[group], columns=[column])
        try:
            for batch in batches:
                for text in batch.column(0).to_pylist():
                    yield text or ""
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise DataError(f"{file}: row group {group}: {reason(error)}") from error


# ------------------------------------------------------------------ JSON lines


def _json_texts(file: Path) -> Iterator[str]:
    number = 0
    try:
        # pyarrow's decompressors notice a file that was cut short; zstandard's stream does not.
        compression = {".gz": "gzip", ".zst": "zstd"}.get(file.suffix)
        with pa.input_stream(str(file), compression=compression) as stream:
            for number, line in enumerate(io.BufferedReader(stream, 1 << 20), start=1):  # type: ignore[arg-type]
                if not line.isspace():
                    yield _json_text(file, number, line)
    except OSError as error:
        raise DataError(f"{file}: after line {number}: {reason(error)}") from error


def _json_text(file: Path, number: int, line: bytes) -> str:
    try:
        record: Any = json.loads(line)
    except ValueError as error:  # broken JSON or broken UTF-8
        raise DataError(f"{file}:{number}: not a line of JSON: {reason(error)}") from error
    if not isinstance(record, dict):
        raise DataError(f"{file}:{number}: expected an object with the key `text` or `content`")
    key = next((k for k in TEXT_KEYS if k in record), None)
    if key is None:
        raise DataError(f"{file}:{number}: no key `text` or `content`, only {', '.join(record)}")
    text = record[key]
    if text is not None and not isinstance(text, str):
        raise DataError(f"{file}:{number}: `{key}` holds {type(text).__name__}, expected text")
    return well_formed(text or "")


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
