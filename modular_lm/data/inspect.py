"""What prepared sources hold, for people: a summary with samples, and a check of every byte.

The work of `python -m modular_lm.data.shards`. Reads manifests and shards, changes nothing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from modular_lm.config.schema import ShardsConfig, TokenizerConfig
from modular_lm.data.manifest import FILE, SPLITS, Manifest, ShardInfo
from modular_lm.data.reader import SourceReader
from modular_lm.data.shards import ShardFile
from modular_lm.errors import EXIT_DONE, ConfigError, DataError
from modular_lm.tokenizer import Tokenizer, build_tokenizer

_SHOWN_CHARACTERS = 300
_SHOWN_TOKENS = 24
_VERIFY_THREADS = 8


def look(config: ShardsConfig, given: dict[str, Any]) -> int:
    """The command: print what is asked; the exit code. Raises ConfigError or DataError."""
    if config.action is None:
        raise ConfigError("action=null: expected inspect or verify")
    if not config.dir:
        raise ConfigError("dir=: name a prepared source, or a folder of some")
    for line in {"inspect": inspect, "verify": verify}[config.action](config):
        print(line, flush=True)
    return EXIT_DONE


def source_folders(root: Path) -> list[Path]:
    """The prepared sources at `root`: itself, or those in it. Raises DataError if there is none."""
    if (root / FILE).is_file():
        return [root]
    found = sorted(p.parent for p in root.glob(f"*/{FILE}")) if root.is_dir() else []
    if not found:
        raise DataError(f"dir={root}: neither a prepared source (no {FILE}) nor a folder of some")
    return found


# ------------------------------------------------------------------ inspect


def inspect(config: ShardsConfig) -> Iterator[str]:
    """Lines about each source: what it was made from, what is in it, how documents begin.

    Raises DataError for a source that is not whole, ConfigError for another tokenizer than its.
    """
    tokenizer = _tokenizer(config.tokenizer)
    for folder in source_folders(Path(config.dir).expanduser()):
        manifest = Manifest.load(folder)
        manifest.check_sizes(folder)
        yield from _summary(folder, manifest)
        yield from _documents(config, folder, manifest, tokenizer)
        yield ""


def _tokenizer(config: TokenizerConfig) -> Tokenizer | None:
    """The tokenizer that was named; `bytes`, the default, only where it fits."""
    return None if config == TokenizerConfig() else build_tokenizer(config, key="tokenizer")


def _summary(folder: Path, manifest: Manifest) -> Iterator[str]:
    made_by = manifest.tokenizer
    yield f"{manifest.source} in {folder}"
    yield (
        f"  tokenizer   {made_by.name}, {made_by.n_words:,} tokens, {made_by.content_hash[:12]}; "
        f"stored as {manifest.dtype} in rows of {manifest.row_tokens:,}"
    )
    for name in SPLITS:
        split = manifest.split(name)
        size = sum(shard.size for shard in split.shards)
        line = f"  {name:<11} {split.documents:,} documents, {split.tokens:,} tokens"
        if split.documents:
            line += (
                f" ({split.tokens / split.documents:,.0f} a document, "
                f"{split.text_bytes / split.tokens:.2f} bytes of text a token)"
            )
        yield f"{line}, {len(split.shards):,} shards of {size:,} bytes in all"
    yield f"  settings    {_listed(dataclasses.asdict(manifest.settings))}"
    yield f"  duplicates  {_listed(manifest.duplicates)}"
    yield f"  problems    {_listed(dataclasses.asdict(manifest.problems))}"
    sizes = sum(file.size for file in manifest.inputs)
    yield f"  made from   {len(manifest.inputs):,} files of {sizes:,} bytes: {manifest.command}"
    yield f"  fingerprint {manifest.fingerprint[:16]}"


def _listed(values: Mapping[str, object]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())


def _documents(
    config: ShardsConfig, folder: Path, manifest: Manifest, tokenizer: Tokenizer | None
) -> Iterator[str]:
    if config.samples == 0:
        return
    made_by = manifest.tokenizer
    if tokenizer is None and made_by.name == TokenizerConfig().name:
        tokenizer = build_tokenizer(TokenizerConfig())
    if tokenizer is not None and tokenizer.content_hash != made_by.content_hash:
        raise ConfigError(
            f"tokenizer.name={tokenizer.name}: {folder} was made with another ({made_by.name}, "
            f"{made_by.n_words} tokens, {made_by.content_hash[:12]})"
        )
    reader = SourceReader(folder, config.split)
    for ids in itertools.islice(reader.documents(), config.samples):
        if tokenizer is None:
            shown = " ".join(map(str, ids[:_SHOWN_TOKENS].tolist()))
            yield f"  {len(ids):,} tokens: {shown}{' ...' if len(ids) > _SHOWN_TOKENS else ''}"
            continue
        # No token stands for less than a byte, but for special ones.
        text = tokenizer.decode(ids[: _SHOWN_CHARACTERS + 1].tolist())
        yield f"  {len(ids):,} tokens: {text[:_SHOWN_CHARACTERS]!r}"
    if tokenizer is None:
        yield "  (for text name the tokenizer: tokenizer.name=... tokenizer.path=...)"


# ------------------------------------------------------------------ verify


def verify(config: ShardsConfig) -> Iterator[str]:
    """Read every shard and compare all that is recorded of it; a line per source.

    Raises DataError at the end, one line for each shard that is damaged.
    """
    damaged: list[str] = []
    for folder in source_folders(Path(config.dir).expanduser()):
        manifest = Manifest.load(folder)
        began = time.perf_counter()
        wrong = damage(folder, manifest)
        seconds = time.perf_counter() - began
        splits = [manifest.split(name) for name in SPLITS]
        n_shards = sum(len(split.shards) for split in splits)
        size = sum(info.size for split in splits for info in split.shards)
        if wrong:
            state = f"{len(wrong):,} of {n_shards:,} shards damaged"
        else:
            documents, tokens = (sum(s.documents for s in splits), sum(s.tokens for s in splits))
            state = f"{n_shards:,} shards are whole, {documents:,} documents, {tokens:,} tokens"
        yield f"{manifest.source}: {state}, {size:,} bytes ({size / seconds / 1e6:,.0f} MB/s)"
        damaged += wrong
    if damaged:
        raise DataError("\nerror: ".join(damaged))


def damage(folder: Path, manifest: Manifest) -> list[str]:
    """What is wrong with each shard of a prepared source that is damaged; reads all of them."""
    shards = [(name, info) for name in SPLITS for info in manifest.split(name).shards]
    # Threads, because others run while one hashes or waits for a network file system.
    pool = ThreadPoolExecutor(_VERIFY_THREADS)
    try:
        found = pool.map(partial(_damage_of, folder, manifest), shards)
        return [what for what in found if what is not None]
    finally:
        pool.shutdown(cancel_futures=True)


def _damage_of(folder: Path, manifest: Manifest, shard: tuple[str, ShardInfo]) -> str | None:
    """What is wrong with a shard (split, info), if anything is."""
    try:
        with contextlib.closing(ShardFile(folder, manifest, *shard)) as file:
            file.verify()
    except (DataError, OSError) as error:
        return str(error)
    return None
