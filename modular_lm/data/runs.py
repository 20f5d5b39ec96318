"""Runs: the sorted files that lie between the two passes of the shuffle, read by ranges of keys.

A run is, in little-endian numbers: n and b; an index of 2**b + 1 pairs (record, token), the first
of each bucket of keys that share their b highest bits; n records sorted by key; the tokens of the
documents in that order. So a range of keys is found with two look-ups in the index and read with
one `pread` of records and one of tokens, whatever the size of the run. What keys mean, and who
writes and reads runs when, is the business of `modular_lm.data.shuffle`.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from modular_lm.errors import DataError

# Belongs to the key of finished work: a run of another layout is never read.
LAYOUT = 1
# One document: key, bytes of UTF-8, length in tokens, how many identical documents it stands for.
RECORD = np.dtype(
    [("key", "<u8"), ("text_bytes", "<i8"), ("tokens", "<i4"), ("copies", "<i4")], align=False
)
KEYS = 1 << 64
_BUCKET_RECORDS = 16
_MOST_BITS = 16

Records = npt.NDArray[np.void]
Tokens = npt.NDArray[np.integer]


@dataclass(frozen=True)
class Piece:
    """Documents in the order of their keys: records [n], and their tokens one after the other."""

    records: Records
    tokens: Tokens

    @property
    def starts(self) -> npt.NDArray[np.int64]:
        """[n + 1]: document i is tokens[starts[i] : starts[i + 1]]."""
        return token_starts(self.records)


def token_starts(records: Records) -> npt.NDArray[np.int64]:
    """[n + 1]: where the tokens of each document begin, and where the last one's end."""
    return np.concatenate([[0], np.cumsum(records["tokens"], dtype=np.int64)])


def write_run(file: Path, records: Records, documents: Sequence[Tokens]) -> int:
    """Write documents, sorted by key, as a run; durable and whole once it has its name.

    Returns its size in bytes.
    """
    n = len(records)
    bits = min(_MOST_BITS, max(0, (n // _BUCKET_RECORDS).bit_length() - 1))
    borders = [KEYS * i >> bits for i in range(1 << bits)]
    first = np.append(np.searchsorted(records["key"], np.array(borders, np.uint64)), n)
    index = np.stack([first, token_starts(records)[first]], axis=1).astype("<i8")
    partial = file.with_name(f"{uuid.uuid4().hex}.tmp")
    try:
        with partial.open("wb", buffering=1 << 20) as stream:
            for values in (np.array([n, bits], "<i8"), index, records, *documents):
                stream.write(values.data)
            stream.flush()
            os.fsync(stream.fileno())
            size = stream.tell()
        os.replace(partial, file)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    return size


def read_range(file: Path, dtype: np.dtype[Any], low: int, high: int) -> Piece:
    """The documents of a run with low <= key < high <= 2**64; reads those alone, about.

    Raises DataError for a run that is cut short.
    """
    with file.open("rb", buffering=0) as stream:

        def read(kind: np.dtype[Any], count: int, at: int) -> npt.NDArray[Any]:
            data = np.empty(count, kind)
            if _read_into(stream.fileno(), data, at) != data.nbytes:
                raise DataError(f"{file}: cut short; remove {file.parent} and prepare again")
            return data

        integer = np.dtype("<i8")
        n, bits = (int(v) for v in read(integer, 2, 0))
        shift = 64 - bits
        (first, at), (stop, _) = (
            read(integer, 2, 16 * (1 + bucket)).tolist()
            for bucket in (low >> shift, -(-high >> shift))
        )
        records_at = 16 * (2 + (1 << bits))
        records = read(RECORD, stop - first, records_at + first * RECORD.itemsize)
        inner, outer = (_position(records["key"], key) for key in (low, high))
        at += int(records["tokens"][:inner].sum(dtype=np.int64))
        records = records[inner:outer]
        count = int(records["tokens"].sum(dtype=np.int64))
        tokens_at = records_at + n * RECORD.itemsize
        return Piece(records, read(dtype, count, tokens_at + at * dtype.itemsize))


def _read_into(handle: int, data: npt.NDArray[Any], at: int) -> int:
    view, done = data.view(np.uint8).data, 0
    while done < len(view):  # Linux reads 2 GiB at most at a time
        n = os.preadv(handle, [view[done:]], at + done)
        if n == 0:
            break
        done += n
    return done


def _position(keys: npt.NDArray[np.uint64], key: int) -> int:
    return len(keys) if key >= KEYS else int(np.searchsorted(keys, np.uint64(key)))


# ------------------------------------------------------------------ order


def in_order(records: Records, document: Callable[[int], Tokens]) -> Iterator[tuple[int, int]]:
    """The distinct documents by key: (number, copies), copies being those of all its like.

    records: [n] in any order; document: the tokens of one. Documents are alike if key, bytes of
    text and tokens are. Different ones of the same key are ordered by these, so that the order
    depends on the documents alone.
    """
    order = np.argsort(records["key"], kind="stable")
    keys, copies = records["key"][order], records["copies"]
    borders = [0, *(np.flatnonzero(keys[1:] != keys[:-1]) + 1).tolist(), len(keys)]
    numbers = order.tolist()
    for start, stop in pairwise(borders):
        if stop - start == 1:
            yield numbers[start], int(copies[numbers[start]])
        else:
            yield from _alike(numbers[start:stop], records, document)


def _alike(
    numbers: list[int], records: Records, document: Callable[[int], Tokens]
) -> Iterator[tuple[int, int]]:
    groups: dict[tuple[int, bytes], list[int]] = {}
    for i in numbers:
        groups.setdefault((int(records["text_bytes"][i]), document(i).tobytes()), []).append(i)
    for _, group in sorted(groups.items()):
        yield group[0], int(records["copies"][group].sum())
