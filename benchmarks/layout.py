"""How tokens should lie in a file: bytes on disk, reading speed, and what reading brings in.

    python -m benchmarks.layout [mode ...] [key=value ...]

The same stream of tokens in many layouts: `raw`, nothing but tokens, which is the ceiling; ours
(`modular_lm.data.shards`, every row checked) with other sizes of rows and row groups; and Parquet
columns that pyarrow decodes. `speed` reads samples in three orders from the page cache, by one
thread: sequential, block-shuffled as the plan draws an epoch, and at random places. Tokens are
counted per second of processor time, layouts take turns, and ratios are those within a round.

`pages` counts read amplification: files are written back and dropped from the page cache, samples
are read, and mincore() says which pages are there then; bytes of these per byte of the samples.
It includes what the kernel reads ahead. An eighth of a window of a block-shuffled epoch shows what
is brought in early, a whole window what is brought in for nothing. The folder must be on a disk.

Prints tables and writes benchmarks/results/layout.json.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks._runs import print_table, run_benchmark
from modular_lm.config.schema import TokenizerConfig, key
from modular_lm.data import shards
from modular_lm.data.builtin import ensure_builtin
from modular_lm.data.manifest import Manifest, Problems, Settings, Split
from modular_lm.data.permutation import BLOCK_TOKENS, WINDOW_BLOCKS, Blocks, epoch_order
from modular_lm.data.reader import SourceReader

Tokens = npt.NDArray[np.integer]
Read = Callable[[npt.NDArray[np.int64], int], Tokens]
WHAT = __doc__ or ""
FILE = "train-00000.parquet"
ORDERS = ("sequential", "block-shuffled", "random")
BATCH_TOKENS = 1 << 21
ROW = 1024


@dataclass
class Options:
    tokens: int = key(
        (1 << 27) + (1 << 22), "length of the stream; two windows of the plan's order", ge=1 << 22
    )
    rounds: int = key(3, "how often each layout takes its turn", ge=1)
    seconds: float = key(1.0, "processor time for each layout, order and round", gt=0)
    source: str | None = key(None, "a prepared source, repeated; default: the built-in corpus")
    folder: str = key(tempfile.gettempdir(), "where files are written")


@dataclass(frozen=True)
class Layout:
    """write: the files in a folder, for (tokens, source of them); open: what reads samples."""

    write: Callable[[Path, Tokens, SourceReader], None]
    open: Callable[[Path, np.dtype[Any], int], Read]


# ------------------------------------------------------------------ layouts


def raw(mapped: bool) -> Layout:
    def write(folder: Path, tokens: Tokens, source: SourceReader) -> None:
        tokens.tofile(folder / FILE)

    def open_mapped(folder: Path, dtype: np.dtype[Any], n_tokens: int) -> Read:
        stream = np.memmap(folder / FILE, dtype, "r")

        def read(positions: npt.NDArray[np.int64], seq_len: int) -> Tokens:
            out = np.empty((len(positions), seq_len + 1), dtype)
            for row, start in in_order(positions, seq_len):
                out[row] = stream[start : start + seq_len + 1]
            return out

        return read

    def open_file(folder: Path, dtype: np.dtype[Any], n_tokens: int) -> Read:
        file = (folder / FILE).open("rb", buffering=0)

        def read(positions: npt.NDArray[np.int64], seq_len: int) -> Tokens:
            out = np.empty((len(positions), seq_len + 1), dtype)
            data, width = out.reshape(-1).view(np.uint8).data, (seq_len + 1) * dtype.itemsize
            for row, start in in_order(positions, seq_len):
                part = data[row * width : (row + 1) * width]
                os.preadv(file.fileno(), [part], start * dtype.itemsize)
            return out

        return read

    return Layout(write, open_mapped if mapped else open_file)


def in_order(positions: npt.NDArray[np.int64], seq_len: int) -> Iterator[tuple[int, int]]:
    """(row, first token) of each sample, in the order of the stream."""
    order = np.argsort(positions, kind="stable")
    return zip(order.tolist(), (positions[order] * seq_len).tolist(), strict=True)


def ours(row_tokens: int, group_tokens: int) -> Layout:
    def write(folder: Path, tokens: Tokens, source: SourceReader) -> None:
        made_by = source.manifest.tokenizer
        lengths = [len(d) for d in source.documents(1000)]
        with (
            patch.object(shards, "ROW_TOKENS", row_tokens),
            patch.object(shards, "GROUP_ROWS", group_tokens // row_tokens),
            shards.ShardWriter(folder / FILE, "train", made_by) as writer,
        ):
            done = number = 0
            while done < len(tokens):
                n = lengths[number % len(lengths)]
                writer.add(tokens[done : done + n], 0)
                done, number = done + n, number + 1
        Manifest(
            source="x",
            tokenizer=made_by,
            dtype=made_by.dtype,
            row_tokens=row_tokens,
            settings=Settings(0, 0.0, True, True, False, None),
            train=Split.of([writer.info]),
            val=Split.of([]),
            duplicates={},
            problems=Problems(),
            inputs=(),
            command="",
        ).save(folder)

    def open_source(folder: Path, dtype: np.dtype[Any], n_tokens: int) -> Read:
        return SourceReader(folder).windows

    return Layout(write, open_source)


def parquet(kind: str, group_tokens: int, compression: str) -> Layout:
    """A column that pyarrow decodes, a row group at a time."""

    def write(folder: Path, tokens: Tokens, source: SourceReader) -> None:
        rows = group_tokens if kind == "integers" else group_tokens // ROW
        table = pa.table({"tokens": column(kind, tokens)})
        options: dict[str, Any] = {"compression": compression, "use_dictionary": False}
        pq.write_table(table, folder / FILE, row_group_size=rows, **options)

    def open_file(folder: Path, dtype: np.dtype[Any], n_tokens: int) -> Read:
        file = pq.ParquetFile(folder / FILE)
        decoded: dict[int, Tokens] = {}

        def group(number: int) -> Tokens:
            if number not in decoded:
                while len(decoded) > 1:
                    del decoded[min(decoded)]
                chunk = file.read_row_group(number, use_threads=False)["tokens"].combine_chunks()
                decoded[number] = np.frombuffer(chunk.buffers()[-1], dtype)
            return decoded[number]

        def read(positions: npt.NDArray[np.int64], seq_len: int) -> Tokens:
            out = np.empty((len(positions), seq_len + 1), dtype)
            for row, start in in_order(positions, seq_len):
                done = 0
                while done <= seq_len:
                    number, within = divmod(start + done, group_tokens)
                    n = min(seq_len + 1 - done, group_tokens - within)
                    out[row, done : done + n] = group(number)[within : within + n]
                    done += n
            return out

        return read

    return Layout(write, open_file)


def column(kind: str, tokens: Tokens) -> pa.Array:
    values = pa.array(tokens)
    if kind == "integers":
        return values
    if kind == "fixed_size_list":
        return pa.FixedSizeListArray.from_arrays(values, ROW)
    if kind == "list":
        return pa.ListArray.from_arrays(np.arange(0, len(tokens) + 1, ROW, dtype=np.int32), values)
    rows = pa.binary(ROW * tokens.itemsize)
    buffers = [None, pa.py_buffer(tokens)]
    return pa.FixedSizeBinaryArray.from_buffers(rows, len(tokens) // ROW, buffers)


OURS = f"ours: rows of {shards.ROW_TOKENS}, groups of {shards.GROUP_ROWS}"
LAYOUTS: dict[str, Layout] = {
    "raw, preadv": raw(mapped=False),
    "raw, memmap": raw(mapped=True),
    OURS: ours(shards.ROW_TOKENS, shards.GROUP_ROWS * shards.ROW_TOKENS),
    "rows of 256, groups of 4096": ours(256, 1 << 20),
    "rows of 512, groups of 2048": ours(512, 1 << 20),
    "rows of 4096, groups of 256": ours(4096, 1 << 20),
    "rows of 16384, groups of 64": ours(16384, 1 << 20),
    "rows of 1024, groups of 256": ours(1024, 1 << 18),
    "rows of 1024, groups of 4096": ours(1024, 1 << 22),
    "binary rows, decoded": parquet("rows", 1 << 20, "none"),
    "binary rows, zstd": parquet("rows", 1 << 20, "zstd"),
    "binary rows, zstd, groups of 64": parquet("rows", 1 << 16, "zstd"),
    "list": parquet("list", 1 << 20, "none"),
    "fixed_size_list": parquet("fixed_size_list", 1 << 20, "none"),
    "integers": parquet("integers", 1 << 20, "none"),
    "integers, zstd": parquet("integers", 1 << 20, "zstd"),
}


# ------------------------------------------------------------------ orders


def batches(order: str, n_tokens: int, seq_len: int) -> Iterator[npt.NDArray[np.int64]]:
    """The positions of one batch after the other of an epoch in that order."""
    n = (n_tokens - 1) // seq_len
    size = BATCH_TOKENS // seq_len
    shuffled = np.random.default_rng(0).permutation(n) if order == "random" else None
    for first in range(0, n - size + 1, size):
        nth = np.arange(first, first + size)
        if order == "sequential":
            yield nth
        elif shuffled is not None:
            yield shuffled[nth]
        else:
            yield epoch_order(nth, n, 1, Blocks.for_seq_len(seq_len))


# ------------------------------------------------------------------ speed


def speed(written: dict[str, Path], options: Options, dtype: np.dtype[Any]) -> dict[str, Any]:
    orders = [(order, seq_len) for seq_len in (2048, 256) for order in ORDERS]
    rates: dict[str, dict[str, list[float]]] = {}
    for _ in range(options.rounds):
        for name, folder in written.items():
            (folder / FILE).read_bytes()  # into the page cache
            for order, seq_len in orders:
                read = LAYOUTS[name].open(folder, dtype, options.tokens)
                found = rates.setdefault(f"{order} {seq_len}", {}).setdefault(name, [])
                found.append(rate(read, batches(order, options.tokens, seq_len), seq_len, options))
    names = [f"{order} {n}" for order, n in orders]

    def cell(order: str, name: str) -> str:
        mine, ceiling = rates[order][name], rates[order]["raw, preadv"]
        ratio = statistics.median(a / b for a, b in zip(mine, ceiling, strict=True))
        return f"{statistics.median(mine):.0f} ({ratio:.3f})"

    print("Mtok per second of processor time, by one thread (ratio to raw, preadv)")
    print_table(["layout", "B/token", *names], (
        [name, f"{(folder / FILE).stat().st_size / options.tokens:.3f}",
         *(cell(order, name) for order in names)]
        for name, folder in written.items()
    ))  # fmt: skip
    return rates


def rate(
    read: Read, some: Iterator[npt.NDArray[np.int64]], seq_len: int, options: Options
) -> float:
    """Mtok per second of processor time; the first batch, which opens files, is not counted."""
    read(next(some), seq_len)
    began, n, spent = time.process_time(), 0, 0.0
    for positions in some:
        read(positions, seq_len)
        n += len(positions) * seq_len
        spent = time.process_time() - began
        if spent > options.seconds:
            break
    return n / spent / 1e6


# ------------------------------------------------------------------ pages


def pages(written: dict[str, Path], options: Options, dtype: np.dtype[Any]) -> dict[str, Any]:
    window = WINDOW_BLOCKS * BLOCK_TOKENS
    shares = {
        "sequential, 1/4 of all": ("sequential", options.tokens // 4),
        "block-shuffled, 1/8 window": ("block-shuffled", window // 8),
        "block-shuffled, a window": ("block-shuffled", window),
        "random, 1/16 of all": ("random", options.tokens // 16),
    }
    found: dict[str, dict[str, float]] = {}
    for name in (n for n in written if n.startswith(("raw", "ours", "rows", "binary"))):
        found[name] = {}
        for seq_len in (2048, 8192):
            for what, (order, n_tokens) in shares.items():
                left = drop(written[name] / FILE)
                # Opened and closed in there: mapped pages could not be dropped the next time.
                used = read_samples(name, written[name], options, dtype, order, seq_len, n_tokens)
                new = int((resident(written[name] / FILE) & ~left).sum())
                found[name][f"{seq_len} {what}"] = new * mmap.PAGESIZE / used
    print("bytes of pages in the page cache per byte of samples read")
    rows = ([name, *(f"{x:.2f}" for x in row.values())] for name, row in found.items())
    print_table(["layout", *found[OURS]], rows)
    return found


def read_samples(
    name: str,
    folder: Path,
    options: Options,
    dtype: np.dtype[Any],
    order: str,
    seq_len: int,
    n_tokens: int,
) -> int:
    """Read samples of `seq_len` until they are `n_tokens`; how many bytes they are."""
    read = LAYOUTS[name].open(folder, dtype, options.tokens)
    used = 0
    for positions in batches(order, options.tokens, seq_len):
        used += read(positions, seq_len).nbytes
        if used >= n_tokens * dtype.itemsize:
            break
    return used


def drop(file: Path) -> npt.NDArray[np.bool_]:
    """Write the file back and drop its pages; the few that stay, as `resident` says it.

    Raises RuntimeError where more than one in a hundred stay.
    """
    with file.open("rb") as stream:
        os.fsync(stream.fileno())
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    left = resident(file)
    if left.mean() > 0.01:
        raise RuntimeError(f"{file}: {left.mean():.0%} stays in the page cache; is it on a disk?")
    return left


def resident(file: Path) -> npt.NDArray[np.bool_]:
    """Which pages of the file are in the page cache."""
    libc = ctypes.CDLL(None, use_errno=True)
    with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        view = np.frombuffer(mapped, np.uint8)
        state = np.zeros(-(-len(view) // mmap.PAGESIZE), np.uint8)
        address, size = ctypes.c_void_p(view.ctypes.data), ctypes.c_size_t(len(view))
        if libc.mincore(address, size, ctypes.c_void_p(state.ctypes.data)):
            raise OSError(ctypes.get_errno(), "mincore", str(file))
        del view
    return (state & 1).astype(bool)


# ------------------------------------------------------------------ command


def benchmark(chosen: list[str], options: Options) -> dict[str, Any]:
    given = options.source
    source = SourceReader(Path(given) if given else ensure_builtin(TokenizerConfig()))
    some = source.windows(np.arange(source.n_windows(ROW)), ROW)[:, :ROW].reshape(-1)
    tokens = np.ascontiguousarray(np.resize(some, options.tokens))
    dtype = np.dtype(source.manifest.dtype)
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="layout-") as scratch:
        written = {name: Path(scratch) / str(i) for i, name in enumerate(LAYOUTS)}
        for name, place in written.items():
            place.mkdir()
            LAYOUTS[name].write(place, tokens, source)
        if "speed" in chosen:
            result["speed"] = speed(written, options, dtype)
        if "pages" in chosen:
            result["pages"] = pages(written, options, dtype)
    return result


if __name__ == "__main__":
    run_benchmark("layout", Options, ["speed", "pages"], benchmark, WHAT)
