"""`python -m ray_jobs.prepare`: documents to token shards, on Ray.

All checks, and the download of what is named, come first, without Ray; then the two passes of
`modular_lm.data.shuffle` run as Ray tasks, one per slice of the input and one per shard.
The built-in corpus is small: it is prepared in this process.
"""

from __future__ import annotations

import shlex
import socket
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from modular_lm.cli import run_job
from modular_lm.config import PrepareConfig, TokenizerConfig
from modular_lm.data.builtin import BUILTIN, BUILTIN_DEFAULTS, ensure_builtin, prepare_builtin
from modular_lm.data.hub import fetch_dataset, fetch_tokenizer
from modular_lm.data.manifest import SPLITS, Manifest
from modular_lm.data.prepare import plan_sources, run_plans, serial
from modular_lm.errors import EXIT_DONE, ConfigError, RunFailedError, UserFacingError, reason
from modular_lm.tokenizer import build_tokenizer

WHAT = (
    "Turn documents (parquet, jsonl, jsonl.gz, jsonl.zst), or a data set of the Hugging Face Hub, "
    "into shuffled token shards."
)
USAGE = (
    "python -m ray_jobs.prepare src=TEXT dst=SHARDS tokenizer.name=sp tokenizer.path=MODEL\n"
    "       python -m ray_jobs.prepare dataset=fineweb_edu_10bt dst=SHARDS tokenizer=llama3"
)
_AHEAD = 2  # tasks submitted per CPU


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
                manifests = run_plans(plans, on_ray)
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
    for key in sorted(given.keys() - {"src", "dst", "tokenizer", "overwrite"}):
        default = getattr(BUILTIN_DEFAULTS, key)
        raise ConfigError(
            f"{key}={given[key]}: without dst, the built-in corpus is made as training looks for "
            f"it ({key}={default}); remove the key or set dst"
        )
    folder = ensure_builtin(config.tokenizer, verify=config.overwrite)
    return folder.parent, [Manifest.load(folder)]


# ------------------------------------------------------------------ Ray


def on_ray(function: Callable[[Any], Any], tasks: Sequence[Any]) -> Iterable[Any]:
    """`MapTasks` on Ray: one Ray task of one CPU each; results as they come.

    A few are submitted ahead of what the cluster can run, so that neither the driver nor Ray's
    queue grows with their number. Errors meant for the user travel as values, so that they arrive
    as they were raised. Raises RunFailedError for a task that was lost with its node, or killed,
    more often than Ray tries.
    """
    import ray

    remote = ray.remote(num_cpus=1)(_run_task)
    shared = ray.put(function)  # in pass 2 it lists all runs
    waiting, pending = iter(tasks), set()
    try:
        while True:
            cpus = max(1, int(ray.cluster_resources().get("CPU", 1)))
            room = max(0, _AHEAD * cpus - len(pending))
            pending.update(remote.remote(shared, task) for task in islice(waiting, room))
            if not pending:
                return
            (done,), _ = ray.wait(list(pending))
            pending.discard(done)
            result = _result(done)
            if isinstance(result, UserFacingError):
                raise result
            yield result
    finally:
        for task in pending:
            ray.cancel(task)


def _run_task(function: Callable[[Any], Any], task: Any) -> Any:
    try:
        return function(task)
    except UserFacingError as error:
        return error
    except OSError as error:
        if error.filename is None:
            raise
        return RunFailedError(f"on {socket.gethostname()}: {reason(error)}")


def _result(task: Any) -> Any:
    import ray
    from ray.exceptions import RayError, RayTaskError

    try:
        return ray.get(task)
    except RayTaskError:  # an exception of our own that nobody expected
        raise
    except RayError as error:
        raise RunFailedError(
            f"a task of prepare was lost: {reason(error)}; what is finished is kept: start the "
            "same command again"
        ) from error


# ------------------------------------------------------------------ the table


def format_table(manifests: Sequence[Manifest]) -> str:
    """One line per source and split, then one per kind of problem among the documents."""
    counted = ("documents", "duplicates", "tokens", "text bytes", "shards", "file bytes")
    rows: list[list[str]] = [["source", "split", *counted]]
    for manifest in manifests:
        for name in SPLITS:
            split = manifest.split(name)
            numbers = [split.documents, manifest.duplicates[name], split.tokens, split.text_bytes]
            numbers += [len(split.shards), sum(s.size for s in split.shards)]
            rows.append([manifest.source, name, *[f"{n:,}" for n in numbers]])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        f"{source:<{widths[0]}}  {split:<{widths[1]}}  "
        + "  ".join(n.rjust(w) for n, w in zip(numbers, widths[2:], strict=True))
        for source, split, *numbers in rows
    ]
    return "\n".join([*lines, *_remarks(manifests)])


def _remarks(manifests: Sequence[Manifest]) -> Iterator[str]:
    kinds = {
        "missing": "skipped, text missing (null, no such key, not a string)",
        "empty": "skipped, without text",
        "invalid_utf8": "kept, invalid Unicode replaced by U+FFFD",
        "nul": "kept, with NUL characters",
    }
    for kind, what in kinds.items():
        counts = {m.source: getattr(m.problems, kind) for m in manifests}
        if found := [f"{source}: {n:,}" for source, n in counts.items() if n]:
            yield f"{what}: {', '.join(found)}"
    for dedup, what in ((True, "dropped"), (False, "kept; drop them with dedup=true")):
        counts = {
            m.source: sum(m.duplicates.values()) for m in manifests if m.settings.dedup is dedup
        }
        if found := [f"{source}: {n:,}" for source, n in counts.items() if n]:
            yield f"duplicates, {what}: {', '.join(found)}"


if __name__ == "__main__":
    run_job(PrepareConfig, prepare, what=WHAT, usage=USAGE)
