"""The manifest of a prepared source: what its token shards hold and what they were made from.

A folder is a source exactly when it holds a valid `manifest.json`: the manifest is written last,
atomically, after every shard lies on disk. Plain JSON, so that it can be read without our tools,
and quickly. What the shards look like inside is `modular_lm.data.shards`' business.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modular_lm.errors import DataError
from modular_lm.files import write_text_atomic
from modular_lm.tokenizer import Tokenizer

FORMAT = "modular-lm token shards"
VERSION = 2
FILE = "manifest.json"
SPLITS = ("train", "val")
_AGAIN = "remove the folder and prepare the source again"
_REPLACE = "prepare the source again with overwrite=true"


@dataclass(frozen=True)
class TokenizerId:
    """Which tokenizer made the tokens; `content_hash` decides, `name` is for people."""

    name: str
    content_hash: str
    n_words: int

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> TokenizerId:
        return cls(tokenizer.name, tokenizer.content_hash, tokenizer.n_words)

    @property
    def dtype(self) -> str:
        """The smallest type that holds every id."""
        return "uint16" if self.n_words <= 1 << 16 else "uint32"


@dataclass(frozen=True)
class Settings:
    """What decides which documents go where, apart from the documents and the tokenizer."""

    seed: int
    val_fraction: float
    add_bos: bool
    add_eos: bool
    dedup: bool
    shards: int | None


@dataclass(frozen=True)
class Problems:
    """How many documents of the input were not simply a text.

    Skipped: missing (null, no such key, not a string), empty (no text but white space). Kept:
    invalid_utf8 (repaired: U+FFFD for what was not Unicode), nul (with NUL characters).
    """

    missing: int = 0
    empty: int = 0
    invalid_utf8: int = 0
    nul: int = 0

    @classmethod
    def total(cls, problems: Iterable[Problems]) -> Problems:
        listed = list(problems)
        names = (field.name for field in dataclasses.fields(cls))
        return cls(**{name: sum(getattr(p, name) for p in listed) for name in names})


@dataclass(frozen=True)
class InputFile:
    """A file the source was made from; `name` is relative to the source's folder."""

    name: str
    size: int


@dataclass(frozen=True)
class ShardInfo:
    """One shard: true counts (padding not included), bytes of UTF-8 text, and the file itself."""

    file: str
    documents: int
    tokens: int
    text_bytes: int
    size: int
    sha256: str


@dataclass(frozen=True)
class Split:
    """The shards of a split, in the order of the token stream, and their totals."""

    documents: int
    tokens: int
    text_bytes: int
    shards: tuple[ShardInfo, ...]

    @classmethod
    def of(cls, shards: Iterable[ShardInfo]) -> Split:
        shards = tuple(shards)
        documents, tokens, text_bytes = (
            sum(getattr(s, field) for s in shards)
            for field in ("documents", "tokens", "text_bytes")
        )
        return cls(documents, tokens, text_bytes, shards)


@dataclass(frozen=True)
class Manifest:
    """`manifest.json` as values.

    dtype: type of a token, "uint16" or "uint32"; row_tokens: tokens per row of a shard;
    duplicates: per split, how many documents of the input were further copies of another; they are
    among the documents unless settings.dedup.
    """

    source: str
    tokenizer: TokenizerId
    dtype: str
    row_tokens: int
    settings: Settings
    train: Split
    val: Split
    duplicates: dict[str, int]
    problems: Problems
    inputs: tuple[InputFile, ...]
    command: str

    @classmethod
    def load(cls, folder: Path) -> Manifest:
        """Read the manifest of a source.

        Raises DataError if it is missing, cut short, of a newer version, or something else.
        """
        file = folder / FILE
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise DataError(
                f"{folder}: no {FILE}, so not a prepared source; make one with "
                f"python -m ray_jobs.prepare src=TEXT dst={folder.parent}"
            ) from error
        except ValueError as error:
            raise DataError(f"{file}: damaged ({error}); {_AGAIN}") from error
        if not isinstance(values, dict) or values.pop("format", None) != FORMAT:
            raise DataError(f"{file}: not a manifest of {FORMAT}")
        version = values.pop("version", None)
        if version != VERSION:
            raise DataError(
                f"{file}: format version {version}, this program reads {VERSION}; {_AGAIN}, "
                "or use the program that wrote it"
            )
        return _from_json(file, values)

    def save(self, folder: Path) -> None:
        """Write atomically and durably; from then on the folder is a source."""
        values = {"format": FORMAT, "version": VERSION, **dataclasses.asdict(self)}
        text = json.dumps(values, indent=1, ensure_ascii=False)
        write_text_atomic(folder / FILE, text + "\n")

    def split(self, name: str) -> Split:
        """The split of that name; KeyError for another than train or val."""
        return {"train": self.train, "val": self.val}[name]

    @functools.cached_property
    def fingerprint(self) -> str:
        """sha256 (hex) of the tokens and their order: equal for equal data."""
        shards = [[s.sha256 for s in self.split(name).shards] for name in SPLITS]
        identity = [FORMAT, VERSION, self.dtype, self.row_tokens, shards]
        return hashlib.sha256(json.dumps(identity).encode()).hexdigest()

    def check_sizes(self, folder: Path) -> None:
        """Raise DataError unless every shard is there in its full length. Reads no shard."""
        for name in SPLITS:
            for shard in self.split(name).shards:
                check_size(folder / shard.file, shard.size)


def check_size(file: Path, size: int) -> None:
    """Raise DataError unless `file` has `size` bytes."""
    try:
        found = file.stat().st_size
    except FileNotFoundError as error:
        raise DataError(f"{file}: named in {FILE} but missing; {_REPLACE}") from error
    if found != size:
        raise DataError(
            f"{file}: has {found:,} bytes, {FILE} says {size:,}: cut short or replaced; {_REPLACE}"
        )


def _from_json(file: Path, values: dict[str, Any]) -> Manifest:
    try:
        for name in SPLITS:
            split = values[name]
            split["shards"] = tuple(ShardInfo(**s) for s in split["shards"])
            values[name] = Split(**split)
        values["tokenizer"] = TokenizerId(**values["tokenizer"])
        values["settings"] = Settings(**values["settings"])
        values["problems"] = Problems(**values["problems"])
        values["inputs"] = tuple(InputFile(**i) for i in values["inputs"])
        manifest = Manifest(**values)
    except (TypeError, KeyError) as error:
        raise DataError(f"{file}: damaged ({error}); {_AGAIN}") from error
    for name in SPLITS:
        if Split.of(manifest.split(name).shards) != manifest.split(name):
            raise DataError(
                f"{file}: damaged: totals of {name} are not the sums of its shards; {_AGAIN}"
            )
    return manifest
