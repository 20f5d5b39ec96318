"""From documents to prepared sources: what is checked, planned, run and published.

`plan_sources` looks at everything that can be wrong before anything is written; `run_plans` does
the work. How tasks are executed is a parameter (`serial` here, Ray Data in `ray_jobs.prepare`), so
the result cannot depend on it. A source is built in `<dst>/<source>.partial` and renamed when it
is whole, under a lock; what an interrupted run left there is removed by the next.
"""

from __future__ import annotations

import contextlib
import logging
import math
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from modular_lm.config.schema import PrepareConfig
from modular_lm.data.documents import Slice, Source, find_sources, split_file
from modular_lm.data.manifest import (
    FILE,
    SPLITS,
    InputFile,
    Manifest,
    Settings,
    ShardInfo,
    Split,
    TokenizerId,
)
from modular_lm.data.shards import ROW_TOKENS
from modular_lm.data.shuffle import Recipe, ShardTask, SliceResult, SliceTask, tokenise, write_shard
from modular_lm.errors import ConfigError, DataError
from modular_lm.files import Locked, lock, sync
from modular_lm.tokenizer import Tokenizer, build_tokenizer

log = logging.getLogger(__name__)

T = TypeVar("T")
R = TypeVar("R")
# Calls a function on each task and yields the results in any order, as they come.
MapTasks = Callable[[Callable[[Any], Any], Sequence[Any]], Iterable[Any]]

SHARD_TEXT_BYTES = 64 << 20
SLICE_BYTES = 64 << 20
_LOG_SECONDS = 5.0


@dataclass(frozen=True)
class SourcePlan:
    """One source to prepare into `folder`; `done` is its manifest if there is nothing to do.

    overwrite: replace a source there that was prepared otherwise.
    """

    name: str
    folder: Path
    slices: tuple[Slice, ...]
    inputs: tuple[InputFile, ...]
    settings: Settings
    tokenizer: Tokenizer
    overwrite: bool
    done: Manifest | None


def prepare_sources(config: PrepareConfig, *, map_tasks: MapTasks | None = None) -> list[Manifest]:
    """Prepare every source below `config.src` into `config.dst`: one manifest per source, by name.

    Raises ConfigError or DataError; then nothing new is left behind.
    """
    return run_plans(plan_sources(config), map_tasks or serial)


def serial(function: Callable[[T], R], tasks: Sequence[T]) -> Iterable[R]:
    """Run the tasks one after the other in this process."""
    return map(function, tasks)


# ------------------------------------------------------------------ plan


def plan_sources(config: PrepareConfig, named: Source | None = None) -> list[SourcePlan]:
    """Check configuration, tokenizer, inputs and what is in `dst` already; write nothing.

    named: the source to prepare, rather than those in `config.src`. Raises ConfigError or
    DataError. Of the inputs it reads footers and first lines only.
    """
    if config.dst is None:
        raise ConfigError("dst=null: name the folder to write the prepared sources to")
    tokenizer = build_tokenizer(config.tokenizer, key="tokenizer")
    sources = find_sources(Path(config.src)) if named is None else [named]
    dst, src = Path(config.dst).expanduser().resolve(), Path(config.src).expanduser().resolve()
    if dst.exists() and not dst.is_dir():
        raise ConfigError(f"dst={config.dst}: is a file; expected a folder")
    if named is None and (dst == src or src in dst.parents):
        raise ConfigError(f"dst={config.dst}: lies in src={config.src}; choose a folder outside")
    return [_plan_source(config, source, dst / source.name, tokenizer) for source in sources]


def _plan_source(
    config: PrepareConfig, source: Source, folder: Path, tokenizer: Tokenizer
) -> SourcePlan:
    settings = Settings(
        config.seed, config.val_fraction, config.add_bos, config.add_eos, config.shards
    )
    inputs = tuple(
        InputFile(str(f.relative_to(source.root)), f.stat().st_size) for f in source.files
    )
    done = _already_prepared(folder, config.overwrite, settings, inputs, tokenizer)
    files = () if done else source.files
    slices = tuple(part for file in files for part in split_file(file, SLICE_BYTES))
    if not done and not slices:
        raise DataError(f"src: the files of source {source.name} hold no documents")
    return SourcePlan(
        source.name, folder, slices, inputs, settings, tokenizer, config.overwrite, done
    )


def _already_prepared(
    folder: Path,
    overwrite: bool,
    settings: Settings,
    inputs: tuple[InputFile, ...],
    tokenizer: Tokenizer,
) -> Manifest | None:
    """The manifest in `folder` if it is what would be made again; None if it is to be made.

    Raises DataError for a folder that must not be replaced.
    """
    if not folder.exists():
        return None
    if not (folder / FILE).exists():
        raise DataError(f"dst: {folder} exists and is no prepared source; choose another dst")
    manifest = Manifest.load(folder)
    before = {**asdict(manifest.settings), "tokenizer": manifest.tokenizer.content_hash[:12]}
    now = {**asdict(settings), "tokenizer": tokenizer.content_hash[:12]}
    changed = [f"{k}: {before[k]} -> {now[k]}" for k in now if before[k] != now[k]]
    if manifest.inputs != inputs:
        changed.append(f"files of src: {_total(manifest.inputs)} -> {_total(inputs)}")
    if overwrite:
        return None if changed or not manifest.is_whole(folder) else manifest
    if changed:
        raise DataError(
            f"dst: {folder} is already prepared, and differently: {'; '.join(changed)}; "
            "set overwrite=true to replace it, or choose another dst"
        )
    manifest.check_sizes(folder)
    return manifest


def _total(inputs: tuple[InputFile, ...]) -> str:
    return f"{len(inputs)} of {sum(i.size for i in inputs):,} bytes"


# ------------------------------------------------------------------ run


def run_plans(plans: Sequence[SourcePlan], map_tasks: MapTasks) -> list[Manifest]:
    """Do what is planned, source after source; the tasks of a source run in parallel.

    Raises DataError for input that turns out to be broken, and for a source that another process
    is preparing or has prepared differently meanwhile; then that source leaves nothing behind.
    """
    manifests = []
    for plan in plans:
        if plan.done:
            log.info("prepare %s: already prepared in %s", plan.name, plan.folder)
        manifests.append(plan.done or _run_plan(plan, map_tasks))
    return manifests


def _run_plan(plan: SourcePlan, map_tasks: MapTasks) -> Manifest:
    new_folders = [p for p in plan.folder.parents if not p.exists()]
    try:
        with lock(plan.folder.with_name(f".{plan.name}.lock"), blocking=False):
            return _build(plan, map_tasks)
    except Locked as error:
        raise DataError(
            f"dst: {plan.folder} is being prepared by {error.holder}; wait for it, or choose "
            "another dst"
        ) from error
    except BaseException:
        _remove_if_empty(new_folders)
        raise


def _build(plan: SourcePlan, map_tasks: MapTasks) -> Manifest:
    """Prepare the source that `plan` describes; its lock is held."""
    # Another process may have prepared it since the plan was made.
    done = _already_prepared(
        plan.folder, plan.overwrite, plan.settings, plan.inputs, plan.tokenizer
    )
    if done:
        return done
    work = plan.folder.with_name(f"{plan.name}.partial")
    if work.exists():
        shutil.rmtree(work)
    recipe = Recipe(plan.tokenizer, plan.settings, work)
    try:
        recipe.scratch.mkdir(parents=True)
        results = _tokenise_all(plan, recipe, map_tasks)
        shards = _write_all(plan, recipe, results, map_tasks)
        manifest = _manifest(plan, results, shards)
        shutil.rmtree(recipe.scratch)
        manifest.save(work)
        _publish(work, plan.folder)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
    return manifest


def _tokenise_all(plan: SourcePlan, recipe: Recipe, map_tasks: MapTasks) -> list[SliceResult]:
    """Pass 1; the results in the order of the input."""
    tasks = [SliceTask(number, part) for number, part in enumerate(plan.slices)]
    progress = _Progress(
        f"{plan.name}: tokenised part", len(tasks), sum(t.part.size for t in tasks)
    )
    results: list[SliceResult] = []
    for result in map_tasks(partial(tokenise, recipe), tasks):
        results.append(result)
        progress.add(result.size, documents=result.documents, tokens=result.tokens)
    if not any(r.documents for r in results):
        raise DataError(f"src: no document of source {plan.name} has any text")
    return sorted(results, key=lambda r: r.number)


def _write_all(
    plan: SourcePlan, recipe: Recipe, results: list[SliceResult], map_tasks: MapTasks
) -> list[ShardInfo]:
    """Pass 2; the shards of both splits, in the order of the token streams."""
    runs = {split: [run for r in results for run in r.runs[split]] for split in SPLITS}
    counts = _shard_counts(plan.settings, sum(r.text_bytes for r in results))
    tasks = [ShardTask(s, number, counts[s]) for s in SPLITS for number in range(counts[s])]
    progress = _Progress(f"{plan.name}: wrote shard", len(tasks), len(tasks))
    shards: list[ShardInfo] = []
    for shard in map_tasks(partial(write_shard, recipe, runs), tasks):
        progress.add(1)
        if shard is not None:
            shards.append(shard)
    return sorted(shards, key=lambda s: (len(s.file), s.file))  # also beyond shard 99999


def _shard_counts(settings: Settings, text_bytes: int) -> dict[str, int]:
    if settings.shards is not None:
        return dict.fromkeys(SPLITS, settings.shards)
    train = math.ceil(text_bytes / SHARD_TEXT_BYTES)
    return {"train": train, "val": max(1, round(train * settings.val_fraction))}


def _manifest(plan: SourcePlan, results: list[SliceResult], shards: list[ShardInfo]) -> Manifest:
    tokenizer = TokenizerId.of(plan.tokenizer)
    train, val = (Split.of(s for s in shards if s.file.startswith(name)) for name in SPLITS)
    return Manifest(
        source=plan.name,
        tokenizer=tokenizer,
        dtype=tokenizer.dtype,
        row_tokens=ROW_TOKENS,
        settings=plan.settings,
        train=train,
        val=val,
        skipped_documents=sum(r.skipped for r in results),
        inputs=plan.inputs,
        command=shlex.join(sys.argv),
    )


def _publish(work: Path, folder: Path) -> None:
    """Put the finished source in its place; the one it replaces goes last."""
    replaced = folder.with_name(f"{folder.name}.replaced")
    shutil.rmtree(replaced, ignore_errors=True)
    if folder.exists():
        folder.rename(replaced)
    work.rename(folder)
    sync(folder.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _remove_if_empty(folders: Iterable[Path]) -> None:
    with contextlib.suppress(OSError):
        for folder in folders:
            folder.rmdir()


class _Progress:
    """Logs a line every few seconds and at the end: how much is done, how fast, how long it takes.

    tasks: how many there are; total: what the amounts given to `add` sum to.
    """

    def __init__(self, what: str, tasks: int, total: int) -> None:
        self._what, self._tasks, self._total = what, tasks, total
        self._done = self._amount = self._documents = self._tokens = 0
        self._start = self._logged = time.monotonic()

    def add(self, amount: int, *, documents: int = 0, tokens: int = 0) -> None:
        self._done += 1
        self._amount += amount
        self._documents += documents
        self._tokens += tokens
        now = time.monotonic()
        last = self._done == self._tasks
        if last or now - self._logged >= _LOG_SECONDS:
            self._logged = now
            self._log(now - self._start, last)

    def _log(self, seconds: float, last: bool) -> None:
        text = f"prepare {self._what} {self._done:,}/{self._tasks:,} in {seconds:.1f} s"
        if self._documents:
            text += (
                f", {self._documents:,} documents ({self._documents / seconds:,.0f}/s), "
                f"{self._tokens:,} tokens ({self._tokens / seconds:,.0f}/s)"
            )
        if not last:
            left = seconds * (self._total / max(1, self._amount) - 1)
            text += f", {left:.0f} s left"
        log.info(text)
