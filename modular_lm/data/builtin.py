"""The built-in corpus: the source files of this Python's standard library, one document each.

Real text that every machine has, so that a first run needs no data. It is prepared once per Python
version and tokenizer into a cache outside of all runs (`MODULAR_LM_CACHE`, else `modular-lm` in the
user's cache folder), under a lock: whoever comes second waits.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import platform
import shutil
import sysconfig
import tempfile
import tokenize
from collections.abc import Iterator
from pathlib import Path

from modular_lm.config.schema import PrepareConfig, TokenizerConfig
from modular_lm.data.inspect import damage
from modular_lm.data.manifest import VERSION, Manifest
from modular_lm.data.prepare import prepare_sources
from modular_lm.errors import DataError
from modular_lm.files import lock
from modular_lm.tokenizer import build_tokenizer

log = logging.getLogger(__name__)

BUILTIN = "builtin"
# Of some 700 files, 5 % make a validation split worth averaging over.
BUILTIN_DEFAULTS = PrepareConfig(val_fraction=0.05)
_SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


def ensure_builtin(config: TokenizerConfig, *, verify: bool = False) -> Path:
    """The folder of the built-in corpus for this tokenizer; prepared first if it is missing.

    verify: also made again if a shard is damaged, which needs reading all of them.
    Needs no Ray. Callers at the same time, in any process of this machine, wait for one of them.
    Raises ConfigError for a tokenizer that cannot be loaded.
    """
    folder = _folder(config)
    if _is_whole(folder, verify):
        return folder
    with lock(folder.parent / "lock"):
        if not _is_whole(folder, verify):
            if folder.exists():
                shutil.rmtree(folder)
            log.info("preparing the built-in corpus in %s", folder)
            job = dataclasses.replace(BUILTIN_DEFAULTS, tokenizer=config, dst=str(folder.parent))
            prepare_builtin(job)
    return folder


def builtin_folder(config: TokenizerConfig) -> tuple[Path, bool]:
    """Where the built-in corpus for this tokenizer belongs, and whether it is there, whole."""
    folder = _folder(config)
    return folder, _is_whole(folder, verify=False)


def prepare_builtin(config: PrepareConfig) -> Manifest:
    """Prepare the built-in corpus as `config` says, into the folder `builtin` of `config.dst`."""
    with tempfile.TemporaryDirectory(prefix="modular-lm-") as scratch:
        documents = Path(scratch) / f"{BUILTIN}.jsonl"
        with documents.open("w", encoding="utf-8") as stream:
            for text in standard_library():
                stream.write(json.dumps({"text": text}) + "\n")
        (manifest,) = prepare_sources(dataclasses.replace(config, src=str(documents)))
    return manifest


def standard_library() -> Iterator[str]:
    """The text of each source file of the standard library, tests left out, in a fixed order."""
    root = Path(sysconfig.get_path("stdlib"))
    unreadable = 0
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(set(folders) - _SKIPPED_FOLDERS)
        for name in sorted(files):
            if not name.endswith(".py"):
                continue
            try:
                with tokenize.open(os.path.join(folder, name)) as stream:  # honours coding lines
                    yield stream.read()
            except (SyntaxError, UnicodeDecodeError, OSError):
                unreadable += 1
    if unreadable:
        log.info("built-in corpus: %d files could not be read and were left out", unreadable)


def _folder(config: TokenizerConfig) -> Path:
    """Where the corpus belongs: named after all that decides its content."""
    tokenizer = build_tokenizer(config).content_hash[:16]
    settings = dataclasses.replace(BUILTIN_DEFAULTS, tokenizer=TokenizerConfig())
    digest = hashlib.sha256(repr(settings).encode()).hexdigest()[:8]
    python = f"{platform.python_implementation().lower()}{platform.python_version()}"
    return _cache() / f"{python}-v{VERSION}-{tokenizer}-{digest}" / BUILTIN


def _cache() -> Path:
    chosen = os.environ.get("MODULAR_LM_CACHE")
    if chosen:
        return Path(chosen).expanduser().resolve()
    user = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(user).expanduser() / "modular-lm"


def _is_whole(folder: Path, verify: bool) -> bool:
    try:
        manifest = Manifest.load(folder)
        manifest.check_sizes(folder)
    except DataError:
        return False
    return not (verify and damage(folder, manifest))
