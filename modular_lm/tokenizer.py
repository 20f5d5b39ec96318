"""Text to token ids and back: bytes, sentencepiece and tiktoken behind one interface.

A tokenizer is a table of the UTF-8 bytes that each id stands for, a function that segments text,
and the ids of BOS and EOS; the three kinds differ in how they build these. Text is always encoded
as ordinary text: `<s>` or `<|end_of_text|>` inside a document never becomes a special id.
Imports no torch. How shards record which tokenizer made them is `modular_lm.data.shards`' business.
"""

from __future__ import annotations

import base64
import binascii
import difflib
import functools
import hashlib
import re
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from modular_lm.config.schema import TokenizerConfig
from modular_lm.errors import ConfigError

# How Llama 3 cuts text before merging (meta-llama/llama-models, models/llama3/tokenizer.py).
_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3_SPECIALS = 256
# tiktoken's regular expressions overflow their stack on a run of some 10^5 blanks. Llama 3's own
# code cuts runs of 25 000 blanks or non-blanks; so do we, for the same ids.
_LONG_RUN = re.compile(r"\s{25000}(?=\s)|\S{25000}(?=\S)")
_WINDOW = 12_500
_DOWNLOAD_SECONDS = 15


class Tokenizer(Protocol):
    """What the rest of the code knows of a tokenizer. Instances can be pickled."""

    @property
    def name(self) -> str:
        """The kind: a key of `KINDS`."""
        ...

    @property
    def n_words(self) -> int:
        """Ids are 0 .. n_words - 1, special ones included."""
        ...

    @property
    def bos_id(self) -> int: ...

    @property
    def eos_id(self) -> int: ...

    @property
    def content_hash(self) -> str:
        """sha256 (hex) of what decides the ids; independent of paths and machines."""
        ...

    @property
    def token_bytes(self) -> np.ndarray:
        """[n_words] int32: UTF-8 bytes that each token stands for; 0 for special ids."""
        ...

    @property
    def prefix_bytes(self) -> int:
        """Bytes by which the tokens of any text exceed it: 1 if a space is put in front."""
        ...

    @property
    def file(self) -> Path | None:
        """The file to copy beside a checkpoint; None if `name` and `path` alone suffice."""
        ...

    def encode(self, text: str, *, add_bos: bool = False, add_eos: bool = False) -> list[int]:
        """Ids of `text`. Lone surrogates, which no UTF-8 can hold, are encoded as U+FFFD."""
        ...

    def encode_array(
        self, utf8: bytes, dtype: npt.DTypeLike, *, add_bos: bool = False, add_eos: bool = False
    ) -> npt.NDArray[np.integer]:
        """`encode` for long texts, given as UTF-8: [n] of an integer type that holds every id."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`: special and unknown ids are dropped, invalid UTF-8 becomes U+FFFD."""
        ...


def build_tokenizer(config: TokenizerConfig, *, key: str = "data.tokenizer") -> Tokenizer:
    """Load the tokenizer that `config` names.

    `key` is where the config lives in the job's tree, for messages. Raises ConfigError if the path
    is missing, holds no model of this kind, or names an encoding that cannot be downloaded, and for
    a name that is only `prepare`'s to download.
    """
    if config.name not in KINDS:
        raise ConfigError(
            f"{key}.name={config.name}: run `python -m ray_jobs.prepare dst=DATA "
            f"tokenizer={config.name} download_only=true` and give the name and path it prints"
        )
    where = f"{key}.path={'null' if config.path is None else config.path}"
    return _TableTokenizer(config.name, config.path, KINDS[config.name](config.path, where))


def well_formed(text: str) -> str:
    """`text` with lone surrogates (as JSON may hold, e.g. "\\ud800") replaced by U+FFFD."""
    if text.isascii():
        return text
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


@dataclass(frozen=True)
class _Table:
    """What a kind provides. `pieces[i]` are the bytes of id i, empty for special ids.

    encode, encode_array: ids of well-formed text, given as such or as UTF-8.
    """

    pieces: Sequence[bytes]
    bos_id: int
    eos_id: int
    encode: Callable[[str], list[int]]
    encode_array: Callable[[bytes], npt.NDArray[np.integer]]
    content_hash: str
    prefix_bytes: int = 0
    file: Path | None = None


class _TableTokenizer:
    def __init__(self, name: str, path: str | None, table: _Table) -> None:
        self.name = name
        self.bos_id, self.eos_id = table.bos_id, table.eos_id
        self.n_words = len(table.pieces)
        self.content_hash = table.content_hash
        self.token_bytes = np.array([len(p) for p in table.pieces], dtype=np.int32)
        self.prefix_bytes = table.prefix_bytes
        self.file = table.file
        self._pieces, self._table = table.pieces, table
        # Absolute, because a Ray worker that unpickles it may run in another folder.
        self._source = (name, path if table.file is None else str(table.file))

    def encode(self, text: str, *, add_bos: bool = False, add_eos: bool = False) -> list[int]:
        ids = self._table.encode(well_formed(text))
        return [self.bos_id] * add_bos + ids + [self.eos_id] * add_eos

    def encode_array(
        self, utf8: bytes, dtype: npt.DTypeLike, *, add_bos: bool = False, add_eos: bool = False
    ) -> npt.NDArray[np.integer]:
        ids = self._table.encode_array(utf8)
        tokens = np.empty(add_bos + len(ids) + add_eos, dtype)
        tokens[add_bos : add_bos + len(ids)] = ids
        if add_bos:
            tokens[0] = self.bos_id
        if add_eos:
            tokens[-1] = self.eos_id
        return tokens

    def decode(self, ids: Iterable[int]) -> str:
        data = b"".join(self._pieces[i] for i in ids if 0 <= i < self.n_words)
        if self.prefix_bytes and data.startswith(b" "):
            data = data[1:]
        return data.decode("utf-8", "replace")

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, self._source


@functools.lru_cache(maxsize=4)
def _rebuild(name: Any, path: str | None) -> Tokenizer:
    """Unpickling; remembered, so that the tasks of one Ray worker process load a model once."""
    return build_tokenizer(TokenizerConfig(name=name, path=path))


# ------------------------------------------------------------------ bytes


def _bytes(path: str | None, where: str) -> _Table:
    """256 byte values, BOS = 256, EOS = 257, as in Meta Lingua."""
    if path is not None:
        kinds = " or ".join(k for k in KINDS if k != "bytes")
        raise ConfigError(f"{where}: the tokenizer `bytes` has no file; set the name to {kinds}")
    pieces = [bytes([b]) for b in range(256)] + [b"", b""]

    def encode_array(utf8: bytes) -> npt.NDArray[np.uint8]:
        return np.frombuffer(utf8, np.uint8)

    hashed = _hash(b"bytes", pieces)
    return _Table(pieces, 256, 257, lambda text: list(text.encode()), encode_array, hashed)


# ------------------------------------------------------------------ sentencepiece


def _sentencepiece(path: str | None, where: str) -> _Table:
    from sentencepiece import SentencePieceProcessor

    file = _existing(path, where, "a sentencepiece model (*.model)")
    try:
        # A serialised model starts with the tag of its first piece: a check that does not read
        # gigabytes when the path is that of a data file.
        if _head(file, 1) != b"\n":
            raise RuntimeError
        model = SentencePieceProcessor(model_file=str(file))
    except RuntimeError as error:
        raise ConfigError(f"{where}: not a sentencepiece model{_other_kind(file)}") from error
    if min(model.bos_id(), model.eos_id()) < 0:
        raise ConfigError(f"{where}: this sentencepiece model lacks a BOS or EOS piece")
    puts_space = model.encode("a", out_type=str)[0].startswith("▁")
    return _Table(
        pieces=[_sp_piece(model, i) for i in range(model.get_piece_size())],
        bos_id=model.bos_id(),
        eos_id=model.eos_id(),
        encode=model.encode,
        # Takes two thirds of the time of np.array.
        encode_array=lambda utf8: np.fromiter(model.encode(utf8.decode()), np.int32),
        content_hash=_hash(b"sp", [file.read_bytes()]),
        prefix_bytes=int(puts_space),
        file=file,
    )


def _sp_piece(model: Any, i: int) -> bytes:
    if model.is_control(i) or model.is_unknown(i) or model.is_unused(i):
        return b""
    piece = model.id_to_piece(i)
    if model.is_byte(i):  # written <0x0A>
        return bytes([int(piece[3:-1], 16)])
    return piece.replace("▁", " ").encode()


# ------------------------------------------------------------------ tiktoken


def _tiktoken(path: str | None, where: str) -> _Table:
    from tiktoken import list_encoding_names

    wanted = "a tiktoken rank file or the name of an encoding"
    if path is not None and not Path(path).exists():
        names = list_encoding_names()
        if path in names:
            return _named_encoding(path, where)
        close = difflib.get_close_matches(path, names, n=1)
        hint = f"; did you mean {close[0]}?" if close else f" ({', '.join(names)})"
        raise ConfigError(f"{where}: neither a file nor the name of a tiktoken encoding{hint}")
    return _rank_file(_existing(path, where, wanted), where)


def _rank_file(file: Path, where: str) -> _Table:
    """Llama 3's format: `base64(bytes) rank` per line, then 256 special ids."""
    from tiktoken import Encoding

    try:
        ranks = _read_ranks(file)
    except ValueError as error:
        raise ConfigError(f"{where}: not a tiktoken rank file{_other_kind(file)}") from error
    n = len(ranks)
    specials = {f"<|special_{i}|>": n + i for i in range(_LLAMA3_SPECIALS)}
    encoding = Encoding(
        file.stem, pat_str=_LLAMA3_SPLIT, mergeable_ranks=ranks, special_tokens=specials
    )
    pieces = [*ranks, *[b""] * _LLAMA3_SPECIALS]
    # <|begin_of_text|> and <|end_of_text|> are the first two specials.
    return _tiktoken_table(encoding, pieces, (n, n + 1), b"tiktoken:llama3", file)


def _read_ranks(file: Path) -> dict[bytes, int]:
    """Bytes to rank, in the order of the ranks. Raises ValueError if `file` is something else."""
    if b" " not in _head(file, 64):
        raise ValueError("no line `base64 rank`")
    ranks = {}
    for line in file.read_bytes().splitlines():
        piece, rank = line.split()
        try:
            ranks[base64.b64decode(piece, validate=True)] = int(rank)
        except binascii.Error as error:
            raise ValueError("not base64") from error
    ordered = dict(sorted(ranks.items(), key=lambda item: item[1]))
    if list(ordered.values()) != list(range(len(ordered))):
        raise ValueError("ranks are not 0, 1, 2, ...")
    if not all(bytes([b]) in ordered for b in range(256)):
        raise ValueError("a byte value has no rank")
    return ordered


def _named_encoding(name: str, where: str) -> _Table:
    """An encoding that tiktoken downloads (or finds in TIKTOKEN_CACHE_DIR)."""
    encoding = _download(name, where)
    end = encoding.encode_single_token("<|endoftext|>")
    specials = {encoding.encode_single_token(s) for s in encoding.special_tokens_set}
    pieces = [b""] * encoding.n_vocab
    for i in set(range(encoding.n_vocab)) - specials:
        try:
            pieces[i] = encoding.decode_single_token_bytes(i)
        except KeyError:  # some encodings have unused ids between their special ones
            continue
    return _tiktoken_table(encoding, pieces, (end, end), f"tiktoken:{name}".encode(), None)


def _tiktoken_table(
    encoding: Any, pieces: list[bytes], bos_eos: tuple[int, int], kind: bytes, file: Path | None
) -> _Table:
    def encode(text: str) -> list[int]:
        return [i for run in _short_runs(text) for i in encoding.encode_ordinary(run)]

    def encode_array(utf8: bytes) -> npt.NDArray[np.integer]:
        texts = _short_runs(utf8.decode())
        runs = [encoding.encode_to_numpy(text, disallowed_special=()) for text in texts]
        return runs[0] if len(runs) == 1 else np.concatenate(runs)

    return _Table(pieces, *bos_eos, encode, encode_array, _hash(kind, pieces), file=file)


def _download(name: str, where: str) -> Any:
    """tiktoken downloads without a time limit; on a node behind a firewall it would hang."""
    import tiktoken

    outcome: list[Any] = []

    def load() -> None:
        try:
            outcome.append(tiktoken.get_encoding(name))
        except Exception as error:
            outcome.append(error)

    thread = threading.Thread(target=load, daemon=True)
    thread.start()
    thread.join(_DOWNLOAD_SECONDS)
    if outcome and isinstance(outcome[0], tiktoken.Encoding):
        return outcome[0]
    why = type(outcome[0]).__name__ if outcome else f"no answer in {_DOWNLOAD_SECONDS} s"
    raise ConfigError(
        f"{where}: cannot download this encoding ({why}); load it once where there is a network, "
        "with TIKTOKEN_CACHE_DIR set to a folder that this machine sees too"
    ) from (outcome[0] if outcome else None)


def _short_runs(text: str) -> list[str]:
    """`text`, cut where `_LONG_RUN` says."""
    # That expression is slow. Any run that it finds fills one of these windows.
    windows = range(0, len(text) - _WINDOW + 1, _WINDOW)
    if not any(len(text[i : i + _WINDOW].split(None, 1)) < 2 for i in windows):
        return [text]
    cuts = [match.end() for match in _LONG_RUN.finditer(text)]
    return [text[start:stop] for start, stop in pairwise([0, *cuts, len(text)])]


# ------------------------------------------------------------------ shared by the kinds


def _existing(path: str | None, where: str, wanted: str) -> Path:
    if path is None:
        raise ConfigError(f"{where}: this kind of tokenizer needs {wanted}")
    file = Path(path).expanduser()
    if not file.is_file():
        raise ConfigError(f"{where}: no such file; expected {wanted}")
    return file.resolve()


def _head(file: Path, size: int) -> bytes:
    with file.open("rb") as stream:
        return stream.read(size)


def _other_kind(file: Path) -> str:
    """A hint for the message that refuses `file`: what it looks like instead."""
    head = _head(file, 64)
    if head.startswith(b"PAR1"):
        return " but a parquet file"
    if re.match(rb"[A-Za-z0-9+/]+=* \d+\r?\n", head):
        return " but a tiktoken rank file: set the tokenizer's name to tiktoken"
    if head.startswith(b"\n") and b"<unk>" in head:
        return " but a sentencepiece model: set the tokenizer's name to sp"
    return ""


def _hash(kind: bytes, parts: Iterable[bytes]) -> str:
    digest = hashlib.sha256(kind)
    digest.update(b"".join(len(part).to_bytes(8, "little") + part for part in parts))
    return digest.hexdigest()


KINDS: dict[str, Callable[[str | None, str], _Table]] = {
    "bytes": _bytes,
    "sp": _sentencepiece,
    "tiktoken": _tiktoken,
}
