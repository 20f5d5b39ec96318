"""`python -m ray_jobs.prepare`: documents to token shards, on Ray Data.

All checks, and the download of what is named, come first, without Ray; then the two passes of
`modular_lm.data.shuffle` run as tasks of Ray Data, one per slice of the input and one per shard.
The built-in corpus is small: it is prepared in this process.
"""

from __future__ import annotations

import pickle
import shlex
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from modular_lm.cli import run_job
from modular_lm.config import PrepareConfig, TokenizerConfig
from modular_lm.data.builtin import BUILTIN, BUILTIN_DEFAULTS, ensure_builtin, prepare_builtin
from modular_lm.data.hub import fetch_dataset, fetch_tokenizer
from modular_lm.data.manifest import SPLITS, Manifest
from modular_lm.data.prepare import plan_sources, run_plans, serial
from modular_lm.errors import EXIT_DONE, ConfigError, UserFacingError
from modular_lm.tokenizer import build_tokenizer

WHAT = (
    "Turn documents (parquet, jsonl, jsonl.gz, jsonl.zst), or a data set of the Hugging Face Hub, "
    "into shuffled token shards."
)
USAGE = (
    "python -m ray_jobs.prepare src=TEXT dst=SHARDS tokenizer.name=sp tokenizer.path=MODEL\n"
    "       python -m ray_jobs.prepare dataset=fineweb_edu_10bt dst=SHARDS tokenizer=llama3"
)


def prepare(config: PrepareConfig, given: dict[str, Any]) -> int:
    """Prepare all sources below `config.src`, or the data set that `config` names.

    Prints a table of them and what training needs to know; returns the exit code.
    """
    config = replace(config, tokenizer=fetch_tokenizer(config))
    build_tokenizer(config.tokenizer, key="tokenizer")  # before much is downloaded for it
    named = fetch_dataset(config)
    if config.download_only:
        print(_next_steps(config), flush=True)
        return EXIT_DONE
    if named is None and config.src == BUILTIN:
        folder, manifests = _builtin(config, given)
    else:
        plans = plan_sources(config, named)
        folder = plans[0].folder.parent
        if all(plan.done for plan in plans):
            manifests = run_plans(plans, serial)
        else:
            from ray_jobs._session import ray_session

            with ray_session():
                manifests = run_plans(plans, on_ray_data)
    print(f"sources in {folder}:\n{format_table(manifests)}", flush=True)
    if BUILTIN not in (m.source for m in manifests):  # which training finds by itself
        sources = {manifest.source: 1.0 for manifest in manifests}
        print(f"to train on them: {training_keys(folder, sources, config.tokenizer)}", flush=True)
    return EXIT_DONE


def training_keys(folder: Path, sources: dict[str, float], tokenizer: TokenizerConfig) -> str:
    """The arguments of `ray_jobs.train` for these sources and weights, quoted for a shell."""
    weights = ", ".join(f"{name}: {weight}" for name, weight in sources.items())
    return shlex.join([f"data.root_dir={folder}", f"data.sources={{{weights}}}"]) + (
        f" {_tokenizer_keys(tokenizer, 'data.')}"
    )


def _tokenizer_keys(tokenizer: TokenizerConfig, group: str = "") -> str:
    keys = [f"{group}tokenizer.name={tokenizer.name}"]
    if tokenizer.path is not None:
        keys.append(f"{group}tokenizer.path={tokenizer.path}")
    return shlex.join(keys)


def _next_steps(config: PrepareConfig) -> str:
    """What to do after `download_only`."""
    args = [arg for arg in sys.argv[1:] if not arg.lstrip("-").startswith("download_only=")]
    return (
        f"tokenizer: {_tokenizer_keys(config.tokenizer)}\n"
        "all is on disk; where the work is to be done, with or without a network, run: "
        f"python -m ray_jobs.prepare {shlex.join(args)}"
    )


def _builtin(config: PrepareConfig, given: dict[str, Any]) -> tuple[Path, list[Manifest]]:
    build_tokenizer(config.tokenizer, key="tokenizer")
    if config.dst is not None:
        return Path(config.dst), [prepare_builtin(config)]
    for key in sorted(given.keys() - {"src", "dst", "tokenizer"}):
        default = getattr(BUILTIN_DEFAULTS, key)
        raise ConfigError(
            f"{key}={given[key]}: without dst, the built-in corpus is made as training looks for "
            f"it ({key}={default}); remove the key or set dst"
        )
    folder = ensure_builtin(config.tokenizer)
    return folder.parent, [Manifest.load(folder)]


# ------------------------------------------------------------------ Ray Data


def on_ray_data(function: Callable[[Any], Any], tasks: Sequence[Any]) -> Iterable[Any]:
    """`MapTasks` on Ray: one block and one Ray task per task; results as they come.

    Errors meant for the user travel as values, so that they arrive as they were raised.
    """
    import ray.data

    rows = [{"task": pickle.dumps(task)} for task in tasks]
    dataset = ray.data.from_items(rows, override_num_blocks=len(rows))
    for row in dataset.map(partial(_run_task, function)).iter_rows():
        result = pickle.loads(row["result"])
        if isinstance(result, UserFacingError):
            raise result
        yield result


def _run_task(function: Callable[[Any], Any], row: dict[str, Any]) -> dict[str, Any]:
    try:
        result = function(pickle.loads(row["task"]))
    except UserFacingError as error:
        result = error
    return {"result": pickle.dumps(result)}


# ------------------------------------------------------------------ the table


def format_table(manifests: Sequence[Manifest]) -> str:
    """One line per source and split: documents, tokens, bytes of text, shards, bytes on disk."""
    rows = [["source", "split", "documents", "tokens", "text bytes", "shards", "file bytes"]]
    for manifest in manifests:
        for name in SPLITS:
            split = manifest.split(name)
            numbers = [split.documents, split.tokens, split.text_bytes, len(split.shards)]
            numbers.append(sum(s.size for s in split.shards))
            rows.append([manifest.source, name, *[f"{n:,}" for n in numbers]])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        f"{source:<{widths[0]}}  {split:<{widths[1]}}  "
        + "  ".join(n.rjust(w) for n, w in zip(numbers, widths[2:], strict=True))
        for source, split, *numbers in rows
    ]
    skipped = {m.source: m.skipped_documents for m in manifests if m.skipped_documents}
    if skipped:
        listed = ", ".join(f"{name}: {n:,}" for name, n in skipped.items())
        lines.append(f"skipped, without text: {listed}")
    return "\n".join(lines)


if __name__ == "__main__":
    run_job(PrepareConfig, prepare, what=WHAT, usage=USAGE)
