"""From documents to prepared sources: what is checked, planned, run and published.

`plan_sources` looks at everything that can be wrong before anything is written; `run_plans` does
the work. How tasks are executed is a parameter (`serial` here, Ray in `ray_jobs.prepare`), so the
result cannot depend on it. A source is built in `<dst>/<source>.partial` and renamed when it is
whole, under a lock. However a run ends, the tasks that it finished stay there, without a manifest
and so no source to any reader; the next run takes over those that it would do alike, and removes
the rest.
"""

from __future__ import annotations

import contextlib
import logging
import math
import shlex
import shutil
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from modular_lm.config.schema import PrepareConfig
from modular_lm.data.documents import Part, Source, find_sources, group_parts, split_file
from modular_lm.data.finished import sweep, task_hash
from modular_lm.data.inspect import damage
from modular_lm.data.manifest import (
    FILE,
    FORMAT,
    SPLITS,
    VERSION,
    InputFile,
    Manifest,
    Problems,
    Settings,
    Split,
    TokenizerId,
)
from modular_lm.data.progress import Progress
from modular_lm.data.runs import LAYOUT
from modular_lm.data.shards import ROW_TOKENS
from modular_lm.data.shuffle import (
    MOST_PIECES,
    Recipe,
    Run,
    ShardResult,
    ShardTask,
    SliceResult,
    SliceTask,
    finished_shard,
    finished_slice,
    tokenise,
    write_shard,
)
from modular_lm.errors import ConfigError, DataError
from modular_lm.files import Locked, lock, sync
from modular_lm.tokenizer import Tokenizer, build_tokenizer

log = logging.getLogger(__name__)

T = TypeVar("T")
R = TypeVar("R")
# Calls a function on each task and yields the results in any order, as they come.
MapTasks = Callable[[Callable[[Any], Any], Sequence[Any]], Iterable[Any]]

SHARD_TEXT_BYTES = 64 << 20
# Slices grow with the corpus: enough of them for many cores, and none so small that its runs are.
SLICES = 256
SMALLEST_SLICE, LARGEST_SLICE = 16 << 20, 512 << 20
_PACKED = 3  # bytes of text per byte of an input file, about
_PASS_2 = 0.1  # what pass 2 takes of the time of pass 1, about


@dataclass(frozen=True)
class SourcePlan:
    """One source to prepare into `folder`; `done` is its manifest if there is nothing to do.

    overwrite: replace a source there that was prepared otherwise.
    """

    name: str
    folder: Path
    slices: tuple[SliceTask, ...]
    inputs: tuple[InputFile, ...]
    settings: Settings
    tokenizer: Tokenizer
    overwrite: bool
    done: Manifest | None

    @property
    def work(self) -> Path:
        """Where the source is built."""
        return self.folder.with_name(f"{self.name}.partial")


def prepare_sources(config: PrepareConfig, *, map_tasks: MapTasks | None = None) -> list[Manifest]:
    """Prepare every source below `config.src` into `config.dst`: one manifest per source, by name.

    Raises ConfigError or DataError; then the same call goes on from where this one ended.
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
        seed=config.seed,
        val_fraction=config.val_fraction,
        add_bos=config.add_bos,
        add_eos=config.add_eos,
        dedup=config.dedup,
        shards=config.shards,
    )
    inputs = tuple(
        InputFile(str(f.relative_to(source.root)), f.stat().st_size) for f in source.files
    )
    done = _already_prepared(folder, config.overwrite, settings, inputs, tokenizer)
    slices = () if done else tuple(_slices(source, settings, tokenizer))
    if not done and not slices:
        raise DataError(f"src: the files of source {source.name} hold no documents")
    return SourcePlan(
        source.name, folder, slices, inputs, settings, tokenizer, config.overwrite, done
    )


def _slices(source: Source, settings: Settings, tokenizer: Tokenizer) -> Iterable[SliceTask]:
    """The tasks of pass 1, named after all that decides what they make."""
    stats = {file: file.stat() for file in source.files}
    size = _PACKED * sum(stat.st_size for stat in stats.values()) // SLICES
    size = min(max(size, SMALLEST_SLICE), LARGEST_SLICE)
    recipe = [FORMAT, VERSION, LAYOUT, tokenizer.content_hash]
    recipe += [settings.seed, settings.val_fraction, settings.add_bos, settings.add_eos]

    def identity(part: Part) -> list[Any]:
        stat = stats[part.file]
        return [str(part.file), stat.st_size, stat.st_mtime_ns, part.row_groups]

    parts = (part for file in source.files for part in split_file(file, size))
    for group in group_parts(parts, size):
        yield SliceTask(task_hash(recipe, [identity(part) for part in group]), group)


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
    if overwrite and not changed:
        log.info("prepare: overwrite=true: checking all shards in %s", folder)
    if overwrite:
        return None if changed or damage(folder, manifest) else manifest
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
    is preparing or has prepared differently meanwhile. What is finished of a source by then stays.
    """
    manifests = []
    for plan in plans:
        if plan.done:
            log.info("prepare %s: already prepared in %s", plan.name, plan.folder)
        finished = plan.done if not plan.work.exists() else None
        manifests.append(finished or _run_plan(plan, map_tasks))
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
        shutil.rmtree(plan.work, ignore_errors=True)
        return done
    recipe = Recipe(plan.tokenizer, plan.settings, plan.work)
    for folder in (recipe.scratch, recipe.shards):
        folder.mkdir(parents=True, exist_ok=True)
    try:
        slices, shards = _take_over(plan, recipe)
        _tokenise_rest(plan, recipe, slices, map_tasks)
        if not any(result.documents for result in slices.values()):
            shutil.rmtree(plan.work)
            raise DataError(f"src: no document of source {plan.name} has any text")
        _write_rest(plan, recipe, slices, shards, map_tasks)
    finally:
        _remove_if_empty([recipe.scratch, recipe.shards, plan.work])
    manifest = _manifest(plan, slices.values(), shards)
    manifest.save(recipe.shards)
    _publish(recipe.shards, plan.folder)
    shutil.rmtree(plan.work)
    return manifest


def _take_over(
    plan: SourcePlan, recipe: Recipe
) -> tuple[dict[str, SliceResult], dict[str, ShardResult]]:
    """What an interrupted run has finished of this plan, by task; everything else is removed."""
    slices = _finished(finished_slice, recipe, plan.slices)
    whole = len(slices) == len(plan.slices)
    tasks = _shard_tasks(plan, slices) if whole else []
    shards = _finished(finished_shard, recipe, tasks)
    runs = [r.file for result in slices.values() for split in result.runs.values() for r in split]
    files = [result.shard.file for result in shards.values() if result.shard]
    removed = sweep(recipe.scratch, [*slices, *shards], runs) + sweep(recipe.shards, [], files)
    if slices or removed:
        log.info(
            "prepare %s: taking over %d of %d parts and %s shards of an interrupted run; "
            "%d unfinished or other files removed",
            *(plan.name, len(slices), len(plan.slices)),
            f"{len(shards):,} of {len(tasks):,}" if whole else "no",
            removed,
        )
    return slices, shards


def _finished(
    find: Callable[[Recipe, Any], R | None], recipe: Recipe, tasks: Iterable[Any]
) -> dict[str, R]:
    found = {task.name: find(recipe, task) for task in tasks}
    return {name: result for name, result in found.items() if result is not None}


def _tokenise_rest(
    plan: SourcePlan, recipe: Recipe, slices: dict[str, SliceResult], map_tasks: MapTasks
) -> None:
    """Pass 1 for what is not in `slices`, which it completes."""
    tasks = [task for task in plan.slices if task.name not in slices]
    taken = (len(slices), sum(result.size for result in slices.values()))
    total = sum(task.size for task in plan.slices)
    what = f"{plan.name}: tokenised part"
    progress = Progress(what, len(plan.slices), total, taken=taken, later=_PASS_2)
    for result in map_tasks(partial(tokenise, recipe), tasks):
        slices[result.name] = result
        progress.add(result.size, documents=result.documents, tokens=result.tokens)


def _write_rest(
    plan: SourcePlan,
    recipe: Recipe,
    slices: dict[str, SliceResult],
    shards: dict[str, ShardResult],
    map_tasks: MapTasks,
) -> None:
    """Pass 2 for what is not in `shards`, which it completes."""
    runs: dict[str, list[Run]] = {split: [] for split in SPLITS}
    for task in plan.slices:
        for split in SPLITS:
            runs[split] += slices[task.name].runs[split]
    tasks = _shard_tasks(plan, slices)
    rest = [task for task in tasks if task.name not in shards]
    what, taken = f"{plan.name}: wrote shard", len(tasks) - len(rest)
    progress = Progress(what, len(tasks), len(tasks), taken=(taken, taken))
    for result in map_tasks(partial(write_shard, recipe, runs), rest):
        shards[result.name] = result
        documents, tokens = (
            (result.shard.documents, result.shard.tokens) if result.shard else (0, 0)
        )
        progress.add(1, documents=documents, tokens=tokens)


def _shard_tasks(plan: SourcePlan, slices: dict[str, SliceResult]) -> list[ShardTask]:
    """The tasks of pass 2, named after their split, then all that decides what they make."""
    counts = _shard_counts(plan.settings, sum(r.text_bytes for r in slices.values()))
    recipe = task_hash(asdict(plan.settings), [task.name for task in plan.slices], counts)
    return [
        ShardTask(f"{split}-{number:05d}-{recipe}", split, number, counts[split])
        for split in SPLITS
        for number in range(counts[split])
    ]


def _shard_counts(settings: Settings, text_bytes: int) -> dict[str, int]:
    """Shards per split; of settings and corpus alone, so that equal corpora give equal files."""
    if settings.shards is not None:
        return dict.fromkeys(SPLITS, settings.shards)
    train = min(MOST_PIECES, math.ceil(text_bytes / SHARD_TEXT_BYTES))
    return {"train": train, "val": max(1, round(train * settings.val_fraction))}


def _manifest(
    plan: SourcePlan, slices: Iterable[SliceResult], results: dict[str, ShardResult]
) -> Manifest:
    tokenizer = TokenizerId.of(plan.tokenizer)
    splits: dict[str, Split] = {}
    duplicates: dict[str, int] = {}
    for split in SPLITS:
        mine = [result for name, result in results.items() if name.startswith(f"{split}-")]
        shards = [result.shard for result in mine if result.shard]
        # In the order of the token stream, also beyond shard 99999.
        splits[split] = Split.of(sorted(shards, key=lambda s: (len(s.file), s.file)))
        duplicates[split] = sum(result.duplicates for result in mine)
    return Manifest(
        source=plan.name,
        tokenizer=tokenizer,
        dtype=tokenizer.dtype,
        row_tokens=ROW_TOKENS,
        settings=plan.settings,
        train=splits["train"],
        val=splits["val"],
        duplicates=duplicates,
        problems=Problems.total(result.problems for result in slices),
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
