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
import functools
import hashlib
import os
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

from modular_lm.cli import run_job
from modular_lm.config.schema import ShardsConfig
from modular_lm.data.manifest import FORMAT, VERSION, Manifest, ShardInfo, TokenizerId, check_size
from modular_lm.errors import EXIT_DONE, ConfigError, DataError, reason

ROW_TOKENS = 1024
# 1 M tokens per row group: large enough for scans, small enough to hold many while writing.
GROUP_ROWS = 1024
_MAX_PAGE_HEADER = 128


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
    """One shard of a source, checked against its manifest, read by token position.

    Raises DataError that names the file and what is wrong. Opening reads the footer only; `verify`
    reads everything. `close()` gives the file handle back, as does the end of the object.
    """

    def __init__(self, folder: Path, manifest: Manifest, split: str, info: ShardInfo) -> None:
        self.file, self._info = folder / info.file, info
        check_size(self.file, info.size)
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
        self._dtype = token_dtype(manifest.dtype)
        self._row_tokens = manifest.row_tokens
        self._offsets, self._group_bytes = self._layout(footer)
        self._handle = os.open(self.file, os.O_RDONLY)
        self.close = weakref.finalize(self, os.close, self._handle)

    def read_into(self, start: int, out: memoryview) -> None:
        """Fill `out`, raw bytes of whole tokens, with the tokens from position `start` on.

        Whole rows are read, and checked: raises DataError for one that differs from what was
        written.
        """
        at, row_bytes = start * self._dtype.itemsize, self._row_tokens * self._dtype.itemsize
        first, last = at // row_bytes, -(-(at + len(out)) // row_bytes)
        rows = np.empty((last - first) * row_bytes, np.uint8).data
        self._read_rows(first * row_bytes, rows)
        for row, expected in enumerate(self._checksums[first:last].tolist()):
            if zlib.crc32(rows[row * row_bytes : (row + 1) * row_bytes]) != expected:
                raise self._error(f"row {first + row} differs from what was written (CRC-32)")
        skipped = at - first * row_bytes
        out[:] = rows[skipped : skipped + len(out)]

    def _read_rows(self, at: int, out: memoryview) -> None:
        """Fill `out` with the bytes of the token stream from byte `at` on."""
        done, group_bytes = 0, self._group_bytes
        while done < len(out):
            group, within = divmod(at + done, group_bytes)
            n = min(len(out) - done, group_bytes - within)
            if os.preadv(self._handle, [out[done : done + n]], self._offsets[group] + within) != n:
                raise self._error("ends too early: changed while it was read")
            done += n

    @functools.cached_property
    def _checksums(self) -> npt.NDArray[np.uint32]:
        """The CRC-32 of every row."""
        try:
            return pq.read_table(self.file, columns=["crc32"])["crc32"].to_numpy()
        except (pa.ArrowException, OSError) as error:
            raise self._error(f"checksums cannot be read ({reason(error)})") from error

    def document_starts(self) -> Iterator[npt.NDArray[np.int64]]:
        """Positions within the shard at which documents begin, a row group at a time."""
        parquet = pq.ParquetFile(self.file)
        first = 0
        for group in range(parquet.num_row_groups):
            column = parquet.read_row_group(group, columns=["doc_starts"])["doc_starts"]
            starts = column.combine_chunks()
            rows = np.repeat(np.arange(len(starts)), np.diff(starts.offsets.to_numpy()))
            within = starts.values.to_numpy().astype(np.int64)
            yield first + rows * self._row_tokens + within
            first += self._group_bytes // self._dtype.itemsize

    def verify(self) -> None:
        """Read the whole file; compare its sha256 and where documents begin with the manifest."""
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

    def _layout(self, footer: pq.FileMetaData) -> tuple[list[int], int]:
        """File offset of each row group's tokens, and the bytes of tokens in a full row group."""
        rows = [footer.row_group(g).num_rows for g in range(footer.num_row_groups)]
        width = self._row_tokens * self._dtype.itemsize
        regular = rows and all(r == rows[0] for r in rows[:-1]) and rows[-1] <= rows[0]
        if sum(rows) != -(-self._info.tokens // self._row_tokens) or not regular:
            raise self._error(f"row groups of {rows} rows do not hold {self._info.tokens} tokens")
        offsets = []
        for g, n in enumerate(rows):
            chunk = footer.row_group(g).column(0)
            header = chunk.total_compressed_size - n * width
            plain = chunk.compression == "UNCOMPRESSED" and not chunk.has_dictionary_page
            if not plain or not 0 < header <= _MAX_PAGE_HEADER:
                raise self._error("tokens are not stored plainly: rewritten by another program")
            offsets.append(chunk.data_page_offset + header)
        return offsets, rows[0] * width

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


def main(config: ShardsConfig, given: dict[str, Any]) -> int:
    """The command `python -m modular_lm.data.shards`: print what is asked; the exit code."""
    from modular_lm.data import inspect

    if config.action is None:
        raise ConfigError("action=null: expected inspect or verify")
    if not config.dir:
        raise ConfigError("dir=: name a prepared source, or a folder of some")
    for line in {"inspect": inspect.inspect, "verify": inspect.verify}[config.action](config):
        print(line, flush=True)
    return EXIT_DONE


if __name__ == "__main__":
    run_job(
        ShardsConfig,
        main,
        what="Look into prepared sources, or check them.",
        usage="python -m modular_lm.data.shards action=inspect|verify dir=SHARDS",
    )
