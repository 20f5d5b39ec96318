"""Data sets and tokenizers by name: what a name stands for on the Hugging Face Hub, and getting it.

A download goes to a folder of its own, `<dst>/<dataset>` or `<dst>/tokenizers/<name>`, with the
paths of the repository and a record of what belongs to it (`download.json`: repository, commit,
files, sizes, hashes). The record is written before the first file, so that whoever continues takes
the same commit, and marked complete after the last; a complete download is used without a network.
How a single file is received is the business of `modular_lm.data.transfer`.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from importlib.util import find_spec
from pathlib import Path, PurePosixPath
from typing import Any, Literal, TypeVar

from modular_lm.config.schema import PrepareConfig, TokenizerConfig
from modular_lm.data.documents import Source
from modular_lm.data.transfer import (
    PART,
    HubFile,
    Retries,
    Stopped,
    Transfers,
    Unreachable,
    fetch,
    transient,
)
from modular_lm.errors import ConfigError, DataError, RunFailedError
from modular_lm.files import Locked, lock, write_text_atomic

log = logging.getLogger(__name__)

T = TypeVar("T")
RECORD = "download.json"
_VERSION = 1
_PARALLEL = 8
_CONTACT_TRIES = 3  # to learn soon that there is no network


@dataclass(frozen=True)
class Selection:
    """The files of a repository whose path matches `pattern` (`*` also matches `/`)."""

    kind: Literal["dataset", "model"]
    repo: str
    pattern: str


# The names are those of Meta Lingua, and their like.
DATASETS: dict[str, Selection] = {
    "fineweb_edu": Selection("dataset", "HuggingFaceFW/fineweb-edu", "data/*.parquet"),
    "fineweb_edu_10bt": Selection("dataset", "HuggingFaceFW/fineweb-edu", "sample/10BT/*.parquet"),
    "fineweb_edu_100bt": Selection(
        "dataset", "HuggingFaceFW/fineweb-edu", "sample/100BT/*.parquet"
    ),
    "fineweb_edu_350bt": Selection(
        "dataset", "HuggingFaceFW/fineweb-edu", "sample/350BT/*.parquet"
    ),
    "fineweb": Selection("dataset", "HuggingFaceFW/fineweb", "data/*.parquet"),
    "fineweb_10bt": Selection("dataset", "HuggingFaceFW/fineweb", "sample/10BT/*.parquet"),
    "fineweb_100bt": Selection("dataset", "HuggingFaceFW/fineweb", "sample/100BT/*.parquet"),
    "fineweb_350bt": Selection("dataset", "HuggingFaceFW/fineweb", "sample/350BT/*.parquet"),
    "dclm_baseline_1.0": Selection("dataset", "mlfoundations/dclm-baseline-1.0", "*.jsonl.zst"),
    "dclm_baseline_1.0_10prct": Selection(
        "dataset", "mlfoundations/dclm-baseline-1.0", "global-shard_01_of_10/*.jsonl.zst"
    ),
}
# name -> (kind of tokenizer, the one file that it is read from)
TOKENIZERS: dict[str, tuple[Literal["sp", "tiktoken"], Selection]] = {
    "llama2": ("sp", Selection("model", "meta-llama/Llama-2-7b", "tokenizer.model")),
    "llama3": (
        "tiktoken",
        Selection("model", "meta-llama/Meta-Llama-3-8B", "original/tokenizer.model"),
    ),
    "gemma": ("sp", Selection("model", "google/gemma-2b", "tokenizer.model")),
}


# ------------------------------------------------------------------ the names in a config


def fetch_tokenizer(config: PrepareConfig) -> TokenizerConfig:
    """The tokenizer of `config` as one on disk: a named one is downloaded below `dst` first.

    Raises ConfigError, DataError or RunFailedError.
    """
    name, path = config.tokenizer.name, config.tokenizer.path
    if name not in TOKENIZERS:
        return config.tokenizer
    kind, selection = TOKENIZERS[name]
    if path is not None:
        raise ConfigError(
            f"tokenizer.path={path}: {name} is downloaded; remove the path, or set "
            f"tokenizer.name={kind} to use this file"
        )
    if config.dst is None:
        raise ConfigError(
            f"dst=null: name the folder in which to keep the downloaded tokenizer {name}"
        )
    folder = _absolute(config.dst) / "tokenizers" / name
    (file,) = download(f"tokenizer={name}", selection, folder, None)
    return TokenizerConfig(kind, str(file))


def fetch_dataset(config: PrepareConfig) -> Source | None:
    """Download the data set that `config` names to `src`, by default `<dst>/<dataset>`.

    Returns all its files as one source, which has Lingua's name `<dataset>_shuffled`; None if
    `config` names no data set. Raises ConfigError, DataError or RunFailedError.
    """
    name = config.dataset
    if name is None:
        if config.revision is not None:
            raise ConfigError(f"revision={config.revision}: is of a dataset, and none is named")
        return None
    if config.dst is None:
        raise ConfigError(f"dst=null: name the folder for dataset={name}")
    source, dst = f"{name}_shuffled", _absolute(config.dst)
    root = _dataset_folder(config, dst)
    if dst.is_relative_to(root) or root.is_relative_to(dst / source):
        raise ConfigError(
            f"src={config.src}: the files of dataset={name} need a folder that does not hold "
            f"dst={config.dst} and is not in {source}; without src it is dst/{name}"
        )
    files = download(f"dataset={name}", DATASETS[name], root, config.revision)
    return Source(source, root, tuple(sorted(files)))


def _dataset_folder(config: PrepareConfig, dst: Path) -> Path:
    assert config.dataset is not None
    return dst / config.dataset if config.src == PrepareConfig.src else _absolute(config.src)


def on_disk(config: PrepareConfig) -> dict[str, bool]:
    """What `config` names on the Hub, and whether it is wholly on disk. Asks nobody.

    Raises DataError for the record of a download that cannot be read.
    """
    named: dict[str, Path] = {}
    if config.tokenizer.name in TOKENIZERS and config.dst is not None:
        name = config.tokenizer.name
        named[f"tokenizer={name}"] = _absolute(config.dst) / "tokenizers" / name
    if config.dataset is not None and config.dst is not None:
        named[f"dataset={config.dataset}"] = _dataset_folder(config, _absolute(config.dst))
    records = {what: (folder, Record.load(folder)) for what, folder in named.items()}
    return {what: r is not None and r.is_on_disk(f) for what, (f, r) in records.items()}


def _absolute(path: str) -> Path:
    return Path(path).expanduser().resolve()


# ------------------------------------------------------------------ the record


@dataclass(frozen=True)
class Record:
    """What belongs to a download.

    requested: the revision that was asked for, null for the main branch. commit: what it was.
    """

    selection: Selection
    requested: str | None
    commit: str
    complete: bool
    files: tuple[HubFile, ...]

    def save(self, folder: Path) -> None:
        values = {"version": _VERSION, **asdict(self)}
        write_text_atomic(folder / RECORD, json.dumps(values, indent=1) + "\n")

    @classmethod
    def load(cls, folder: Path) -> Record | None:
        """The record in `folder`, or None. Raises DataError if it cannot be read."""
        file = folder / RECORD
        try:
            values = json.loads(file.read_text())
            if values.pop("version") != _VERSION:
                raise ValueError("another version")
            selection = Selection(**values.pop("selection"))
            files = tuple(HubFile(**f) for f in values.pop("files"))
            return cls(selection=selection, files=files, **values)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{file}: not the record of a download; remove its folder") from error

    def check(self, what: str, folder: Path, selection: Selection, revision: str | None) -> None:
        """Raise DataError if `folder` holds something else than is wanted now."""
        if self.selection != selection:
            raise DataError(
                f"{what}: {folder} holds {self.selection.pattern} of {self.selection.repo}; "
                "remove it, or choose another folder"
            )
        if revision is not None and revision not in (self.requested, self.commit):
            raise DataError(
                f"revision={revision}: {folder} holds {self.requested or 'main'} of "
                f"{self.selection.repo} (commit {self.commit}); remove it, or choose another src"
            )

    def is_on_disk(self, folder: Path) -> bool:
        """Whether the download ended and its files have kept their sizes."""
        return self.complete and all(_has(folder, file) for file in self.files)


def _has(folder: Path, file: HubFile) -> bool:
    target = folder / file.path
    return target.is_file() and target.stat().st_size == file.size


# ------------------------------------------------------------------ downloading


def download(
    what: str, selection: Selection, folder: Path, revision: str | None
) -> tuple[Path, ...]:
    """Bring the selected files into `folder`, or find them there; their paths.

    what: the key and value that ask for them, for messages. A complete download is recognised by
    its record and sizes, without asking the Hub. Raises DataError for what the Hub does not give
    and for a folder with other content, RunFailedError without a network.
    """
    record = Record.load(folder)
    if record is not None:
        record.check(what, folder, selection, revision)
    if record is None or not record.is_on_disk(folder):
        record = _download(what, selection, folder, revision)
    log.info(
        "%s: %d files of %s, commit %s, in %s",
        *(what, len(record.files), selection.repo, record.commit[:12], folder),
    )
    return tuple(folder / file.path for file in record.files)


def _download(what: str, selection: Selection, folder: Path, revision: str | None) -> Record:
    if find_spec("huggingface_hub") is None:
        raise RunFailedError(f"{what}: needs the package huggingface_hub; pip install it")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    for chatty in ("httpx2", "huggingface_hub"):  # a line per request; we report what matters
        logging.getLogger(chatty).setLevel(logging.ERROR)
    new_folders = [p for p in folder.parents if not p.exists()]
    try:
        with lock(folder.with_name(f".{folder.name}.lock"), blocking=False):
            record = Record.load(folder) or _new_record(what, selection, folder, revision)
            try:
                return record if record.is_on_disk(folder) else _bring(what, record, folder)
            except BaseException:
                _remove_if_empty(folder)
                raise
    except Locked as error:
        raise DataError(
            f"{what}: {folder} is being downloaded by {error.holder}; wait for it"
        ) from error
    except Unreachable as error:
        raise RunFailedError(
            f"{error}; on a machine with internet that sees {folder} run the same command with "
            "download_only=true, then this one again"
        ) from error
    finally:
        with contextlib.suppress(OSError):  # what holds a download stays
            for parent in new_folders:
                parent.rmdir()


def _remove_if_empty(folder: Path) -> None:
    """Remove a download of which nothing has come but the record."""
    files = [f for f in folder.rglob("*") if f.is_file() and f.name != RECORD]
    if not any(f.stat().st_size for f in files):
        shutil.rmtree(folder)


def _new_record(what: str, selection: Selection, folder: Path, revision: str | None) -> Record:
    """Ask the Hub what there is, and write it down. `folder` must not hold other files."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise DataError(
            f"{what}: {folder} holds something else than a download of this program (it lacks "
            f"{RECORD}); choose another folder"
        )
    commit, files = _list(what, selection, revision)
    record = Record(selection, revision, commit, False, files)
    folder.mkdir(parents=True, exist_ok=True)
    record.save(folder)
    return record


def _list(what: str, selection: Selection, revision: str | None) -> tuple[str, tuple[HubFile, ...]]:
    """The commit of `revision`, and the selected files in it."""
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    api = HfApi(endpoint=_endpoint())
    about = f"{what}: {selection.repo} at {api.endpoint}"
    fixed, _, _ = selection.pattern.partition("*")
    folder = fixed.rpartition("/")[0]

    def ask() -> tuple[str, list[Any]]:
        info = api.repo_info(
            selection.repo, repo_type=selection.kind, revision=revision, timeout=10
        )
        if info.sha is None:
            raise DataError(f"{about}: the answer names no commit; is it a Hub?")
        tree = api.list_repo_tree(
            selection.repo,
            folder or None,
            recursive=True,
            revision=info.sha,
            repo_type=selection.kind,
        )
        return info.sha, list(tree)

    commit, entries = _persistently(about, ask)
    files = [
        HubFile(
            e.path,
            e.size if e.lfs is None else e.lfs.size,
            None if e.lfs is None else e.lfs.sha256,
            e.blob_id,
        )
        for e in entries
        if isinstance(e, RepoFile) and fnmatchcase(e.path, selection.pattern)
    ]
    if not files:
        raise DataError(f"{about}: no files {selection.pattern} in commit {commit}")
    for file in files:
        if PurePosixPath(file.path).is_absolute() or ".." in PurePosixPath(file.path).parts:
            raise DataError(f"{about}: lists {file.path!r}, which leads out of its folder")
    return commit, tuple(sorted(files, key=lambda f: f.path))


def _persistently(what: str, ask: Callable[[], T]) -> T:
    retries = Retries(what, threading.Event(), _CONTACT_TRIES)
    while True:
        try:
            return ask()
        except transient() as error:
            retries.wait(error)


def _bring(what: str, record: Record, folder: Path) -> Record:
    """Download what is missing, several files at a time; the completed record."""
    record = replace(record, complete=False)
    record.save(folder)
    transfers = Transfers(what, len(record.files), sum(f.size for f in record.files))
    missing = []
    for file in record.files:
        if _has(folder, file):
            transfers.present(file.size)
            transfers.finished()
        else:
            part = folder / (file.path + PART)
            transfers.present(part.stat().st_size if part.exists() else 0)
            missing.append(file)
    with ThreadPoolExecutor(_PARALLEL, "download") as pool:
        running = [
            pool.submit(fetch, _url(record, file), file, folder / file.path, transfers)
            for file in missing
        ]
        try:
            wait(running, return_when=FIRST_EXCEPTION)
        finally:
            transfers.stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
    failures = [f.exception() for f in running if not f.cancelled()]
    for failure in failures:
        if failure is not None and not isinstance(failure, Stopped):
            raise failure
    record = replace(record, complete=True)
    record.save(folder)
    return record


def _url(record: Record, file: HubFile) -> str:
    from huggingface_hub import hf_hub_url

    return hf_hub_url(
        record.selection.repo,
        file.path,
        repo_type=record.selection.kind,
        revision=record.commit,
        endpoint=_endpoint(),
    )


def _endpoint() -> str | None:
    """Read now: the library reads it once, when it is imported."""
    return os.environ.get("HF_ENDPOINT") or None
