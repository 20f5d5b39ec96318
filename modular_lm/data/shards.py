"""The token-shard format: one Parquet file that holds a stream of tokens in rows.

Columns, one line per row of N tokens:
- `tokens`, fixed_size_binary: N little-endian uint16 or uint32; the last row is padded with 0;
- `doc_starts`, list<uint16>: where in the row documents begin;
- `crc32`, uint32: the CRC-32 of the bytes of `tokens`, which every reading checks.
The footer's key-value metadata repeat what is needed to read the file alone: format, dtype, N,
split, tokenizer hash, and the true number of tokens. A shard begins with a document.

Any Parquet reader can read this. Ours needs no decoding at all: tokens are stored uncompressed
and unencoded, one page per row group, so a row group's tokens lie in one piece whose offset the
footer tells, and a sample is read straight into its place by `preadv`. (Plain integer columns
would cost twice the space, as Parquet stores uint16 in 4 bytes, and be 4 to 5 times slower.)
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
import weakref
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from modular_lm.data.manifest import FORMAT, VERSION, Manifest, ShardInfo, TokenizerId, check_size
from modular_lm.errors import DataError, reason

ROW_TOKENS = 1024
# 1 M tokens per row group: large enough for scans, small enough to hold many while writing.
GROUP_ROWS = 1024
_MAX_PAGE_HEADER = 128
# What a reading that meets no cached page brings in: so large that the samples of a block of the
# plan's order cost few requests, so small that little is brought in beyond the block.
_PIECE = 1 << 17
# How long a piece that was asked for is taken to stay in the page cache, and checksums are kept.
_REMEMBERED_S = 60.0
_TOKENS, _CRC32 = 0, 2  # Parquet columns; 1 is doc_starts


def token_dtype(name: str) -> np.dtype[Any]:
    """The little-endian numpy type of a manifest's `dtype`."""
    return np.dtype(name).newbyteorder("<")


class ShardWriter:
    """Writes one shard document by document, holding one row group of tokens in memory.

    A context manager: the file appears under its name only when the block ends without an error;
    then `info` describes it.
    """

    info: ShardInfo

    def __init__(self, file: Path, split: str, tokenizer: TokenizerId) -> None:
        self._file, self._partial = file, file.with_name(f"{file.name}.tmp")
        self._dtype = token_dtype(tokenizer.dtype)
        metadata = _metadata(split, tokenizer, tokenizer.dtype, ROW_TOKENS)
        self._schema = _schema(ROW_TOKENS * self._dtype.itemsize).with_metadata(metadata)
        self._buffer = np.zeros(GROUP_ROWS * ROW_TOKENS, self._dtype)
        self._filled = 0
        self._starts: list[int] = []
        self._documents = self._tokens = self._text_bytes = 0

    def __enter__(self) -> ShardWriter:
        self._writer = pq.ParquetWriter(
            self._partial,
            self._schema,
            compression="none",
            use_dictionary=False,
            write_statistics=False,
            write_page_checksum=True,
            data_page_size=1 << 30,  # one page per row group, which `ShardFile` relies on
        )
        return self

    def add(self, tokens: npt.NDArray[np.integer], text_bytes: int) -> None:
        """Append a document: [n] token ids, n > 0, made from `text_bytes` bytes of UTF-8."""
        self._starts.append(self._filled)
        written = 0
        while written < len(tokens):
            n = min(len(tokens) - written, len(self._buffer) - self._filled)
            self._buffer[self._filled : self._filled + n] = tokens[written : written + n]
            self._filled += n
            written += n
            if self._filled == len(self._buffer):
                self._flush()
        self._documents += 1
        self._tokens += len(tokens)
        self._text_bytes += text_bytes

    def _flush(self) -> None:
        rows = -(-self._filled // ROW_TOKENS)
        self._buffer[self._filled :] = 0
        width = ROW_TOKENS * self._dtype.itemsize
        tokens = pa.FixedSizeBinaryArray.from_buffers(
            pa.binary(width), rows, [None, pa.py_buffer(self._buffer[: rows * ROW_TOKENS])]
        )
        row, column = np.divmod(np.array(self._starts, np.int64), ROW_TOKENS)
        offsets = np.searchsorted(row, np.arange(rows + 1)).astype(np.int32)
        starts = pa.ListArray.from_arrays(
            pa.array(offsets), pa.array(column.astype(np.uint16)), self._schema.field(1).type
        )
        stored = self._buffer.view(np.uint8).data
        checksums = [zlib.crc32(stored[row * width : (row + 1) * width]) for row in range(rows)]
        columns = [tokens, starts, pa.array(checksums, pa.uint32())]
        table = pa.table(columns, schema=self._schema)
        self._writer.write_table(table, row_group_size=rows)
        self._filled, self._starts = 0, []

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None:
            with contextlib.suppress(OSError, pa.ArrowException):  # the first error matters
                self._writer.close()
            self._partial.unlink(missing_ok=True)
            return
        if self._filled:
            self._flush()
        self._writer.add_key_value_metadata({"tokens": str(self._tokens)})
        self._writer.close()
        size, sha256 = _sync_and_hash(self._partial)
        os.replace(self._partial, self._file)
        self.info = ShardInfo(
            self._file.name, self._documents, self._tokens, self._text_bytes, size, sha256
        )


class ShardFile:
    """One shard of a source, checked against its manifest, read by rows or token positions.

    Raises DataError that names the file and what is wrong. Opening reads the footer only, reading
    checks the rows it touches, `verify` reads everything. The file is open from here on until
    `close()`, and again from the next reading on.
    """

    def __init__(self, folder: Path, manifest: Manifest, split: str, info: ShardInfo) -> None:
        self.file, self._info = folder / info.file, info
        self._handle: int | None = None
        self._open()
        try:
            footer = pq.read_metadata(self.file)
        except (pa.ArrowException, OSError) as error:
            raise self._error(f"not a readable parquet file ({reason(error)})") from error
        expected = _metadata(split, manifest.tokenizer, manifest.dtype, manifest.row_tokens)
        expected["tokens"] = str(info.tokens)
        found = {k.decode(): v.decode() for k, v in (footer.metadata or {}).items()}
        for name, value in expected.items():
            if found.get(name) != value:
                raise self._error(f"{name} is {found.get(name)}, the manifest says {value}")
        self._row_tokens = manifest.row_tokens
        self._row_bytes = manifest.row_tokens * token_dtype(manifest.dtype).itemsize
        if not footer.schema.to_arrow_schema().equals(_schema(self._row_bytes)):
            raise self._error("holds other columns: rewritten by another program")
        rows = self._rows(footer)
        self._n_rows, self._group_rows = sum(rows), rows[0]
        self._tokens_at = self._values_at(footer, _TOKENS, self._row_bytes)
        self._checksums_at = self._values_at(footer, _CRC32, 4)
        self._checksums: dict[int, npt.NDArray[np.uint32]] = {}
        self._wanted: set[int] = set()
        self._known_since = 0.0

    def _open(self) -> int:
        check_size(self.file, self._info.size)
        self._handle = os.open(self.file, os.O_RDONLY)
        # The kernel's guesses go wrong where several places are read in turn: `_want` says what.
        os.posix_fadvise(self._handle, 0, 0, os.POSIX_FADV_RANDOM)
        self._give_back = weakref.finalize(self, os.close, self._handle)
        return self._handle

    def close(self) -> None:
        """Give the file handle and the checksums read so far back; the layout stays known."""
        if self._handle is not None:
            self._give_back()
            self._handle = None
            self._checksums.clear()
            self._wanted.clear()

    def read_into(self, start: int, out: memoryview) -> None:
        """Fill `out`, raw bytes of whole tokens, with the tokens from position `start` on.

        Reads, and checks, the whole rows that hold them.
        """
        at = start * (self._row_bytes // self._row_tokens)
        first, skipped = divmod(at, self._row_bytes)
        n_rows = -(-(skipped + len(out)) // self._row_bytes)
        rows = np.empty(n_rows * self._row_bytes, np.uint8).data
        self.read_rows(first, rows)
        out[:] = rows[skipped : skipped + len(out)]

    def read_rows(self, first: int, out: memoryview) -> None:
        """Fill `out`, raw bytes of whole rows, with the rows from number `first` on.

        Raises DataError for a row that differs from what was written.
        """
        done, width = 0, self._row_bytes
        while done < len(out):
            group, within = divmod(first + done // width, self._group_rows)
            n = min(len(out) - done, (self._group_rows - within) * width)
            rows = out[done : done + n]
            at = int(self._tokens_at[group]) + within * width
            self._want(at, n)
            self._fill(rows, at)
            expected = self._checksums_of(group)[within : within + n // width].tolist()
            found = [zlib.crc32(rows[at : at + width]) for at in range(0, n, width)]
            if found != expected:
                wrong = next(i for i, crc in enumerate(found) if crc != expected[i])
                row = group * self._group_rows + within + wrong
                raise self._error(f"row {row} differs from what was written (CRC-32)")
            done += n

    def _checksums_of(self, group: int) -> npt.NDArray[np.uint32]:
        """The CRC-32 of each row of a row group."""
        known = self._checksums.get(group)
        if known is None:
            known = np.empty(min(self._group_rows, self._n_rows - group * self._group_rows), "<u4")
            self._fill(known.view(np.uint8).data, int(self._checksums_at[group]))
            self._checksums[group] = known
        return known

    def _want(self, at: int, n: int) -> None:
        """Have the kernel fetch the pieces of the file that hold these bytes, each of them once.

        After a minute it is asked again: it may have dropped them, which costs little to find out.
        What is known of the rows goes too, so that it does not grow with the run.
        """
        now = time.monotonic()
        if now > self._known_since + _REMEMBERED_S:
            self._wanted.clear()
            self._checksums.clear()
            self._known_since = now
        for piece in range(at // _PIECE, (at + n - 1) // _PIECE + 1):
            if piece not in self._wanted:
                handle = self._open() if self._handle is None else self._handle
                os.posix_fadvise(handle, piece * _PIECE, _PIECE, os.POSIX_FADV_WILLNEED)
                self._wanted.add(piece)

    def _fill(self, out: memoryview, at: int) -> None:
        """Fill `out` with the bytes of the file from byte `at` on."""
        handle = self._open() if self._handle is None else self._handle
        try:
            n = os.preadv(handle, [out], at)
        except OSError as error:
            raise self._error(f"cannot be read ({reason(error)})") from error
        if n != len(out):
            raise self._error("ends too early: changed while it was read")

    def document_starts(self) -> Iterator[npt.NDArray[np.int64]]:
        """Positions within the shard at which documents begin, a row group at a time."""
        parquet = pq.ParquetFile(self.file, page_checksum_verification=True)
        for group in range(parquet.num_row_groups):
            try:
                table = parquet.read_row_group(group, columns=["doc_starts"])
            except (pa.ArrowException, OSError) as error:
                raise self._error(f"doc_starts cannot be read ({reason(error)})") from error
            starts = table["doc_starts"].combine_chunks()
            rows = np.repeat(np.arange(len(starts)), np.diff(starts.offsets.to_numpy()))
            within = starts.values.to_numpy().astype(np.int64)
            yield (group * self._group_rows + rows) * self._row_tokens + within

    def verify(self) -> None:
        """Read the whole file; compare rows, sha256 and documents with what is recorded of them."""
        for first in range(0, self._n_rows, self._group_rows):
            n_rows = min(self._group_rows, self._n_rows - first)
            self.read_rows(first, np.empty(n_rows * self._row_bytes, np.uint8).data)
        with self.file.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        if digest != self._info.sha256:
            raise self._error("content differs from what was written (sha256)")
        starts = np.concatenate([np.empty(0, np.int64), *self.document_starts()])
        if len(starts) != self._info.documents:
            raise self._error(f"holds {len(starts)} documents, not {self._info.documents}")
        inside = starts[0] == 0 and starts[-1] < self._info.tokens
        if not (inside and (np.diff(starts) > 0).all()):
            raise self._error("documents do not begin one behind the other, the first at 0")

    def _rows(self, footer: pq.FileMetaData) -> list[int]:
        """Rows of each row group: all have as many, but for the last."""
        rows = [footer.row_group(g).num_rows for g in range(footer.num_row_groups)]
        regular = rows and all(r == rows[0] for r in rows[:-1]) and rows[-1] <= rows[0]
        if sum(rows) != -(-self._info.tokens // self._row_tokens) or not regular:
            raise self._error(f"row groups of {rows} rows do not hold {self._info.tokens} tokens")
        return rows

    def _values_at(self, footer: pq.FileMetaData, column: int, width: int) -> npt.NDArray[np.int64]:
        """Where in the file each row group's values of a column lie, `width` bytes a row."""
        offsets = []
        for number in range(footer.num_row_groups):
            group = footer.row_group(number)
            chunk = group.column(column)
            header = chunk.total_compressed_size - group.num_rows * width
            plain = chunk.compression == "UNCOMPRESSED" and not chunk.has_dictionary_page
            if not plain or not 0 < header <= _MAX_PAGE_HEADER:
                name = chunk.path_in_schema
                raise self._error(f"{name} are not stored plainly: rewritten by another program")
            offsets.append(chunk.data_page_offset + header)
        return np.array(offsets, np.int64)

    def _error(self, what: str) -> DataError:
        return DataError(f"{self.file}: {what}; prepare the source again with overwrite=true")


def _metadata(split: str, tokenizer: TokenizerId, dtype: str, row_tokens: int) -> dict[str, str]:
    return {
        "format": FORMAT,
        "version": str(VERSION),
        "split": split,
        "tokenizer_hash": tokenizer.content_hash,
        "dtype": dtype,
        "row_tokens": str(row_tokens),
    }


def _schema(row_bytes: int) -> pa.Schema:
    starts = pa.list_(pa.field("element", pa.uint16(), nullable=False))
    return pa.schema(
        [
            pa.field("tokens", pa.binary(row_bytes), nullable=False),
            pa.field("doc_starts", starts, nullable=False),
            pa.field("crc32", pa.uint32(), nullable=False),
        ]
    )


def _sync_and_hash(file: Path) -> tuple[int, str]:
    with file.open("rb") as stream:
        os.fsync(stream.fileno())
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
        return os.fstat(stream.fileno()).st_size, digest


if __name__ == "__main__":
    from modular_lm.cli import run_job
    from modular_lm.config.schema import ShardsConfig
    from modular_lm.data.inspect import look

    run_job(
        ShardsConfig,
        look,
        what="Look into prepared sources, or check them.",
        usage="python -m modular_lm.data.shards action=inspect|verify dir=SHARDS",
    )
