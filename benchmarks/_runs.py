"""What the small training benchmarks share: their command line, parallel runs, tables and JSON."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import torch

from modular_lm.cli import run_job
from modular_lm.config.schema import DataConfig, TokenizerConfig
from modular_lm.data.dataset import Dataset
from modular_lm.errors import ConfigError
from modular_lm.tokenizer import build_tokenizer

Options = TypeVar("Options")
Job = TypeVar("Job")
Result = TypeVar("Result")

RESULTS = Path(__file__).parent / "results"


def run_benchmark(
    name: str,
    options: type[Options],
    modes: Iterable[str],
    benchmark: Callable[[list[str], Options], dict[str, Any]],
    what: str,
) -> None:
    """Be the command `python -m benchmarks.<name> [mode ...] [key=value ...]`, and exit.

    `benchmark` takes the chosen modes (default: all) and the options, prints its table, and returns
    what goes to results/<name>.json beside the options.
    """
    known = list(modes)
    chosen = [a for a in sys.argv[1:] if "=" not in a and not a.startswith("-")]
    rest = [a for a in sys.argv[1:] if a not in chosen]

    def job(given: Options, _: dict[str, Any]) -> int:
        if unknown := set(chosen) - set(known):
            raise ConfigError(f"mode {min(unknown)}: expected some of {', '.join(known)}")
        result = benchmark(chosen or known, given)
        RESULTS.mkdir(exist_ok=True)
        options_given = dataclasses.asdict(given)  # type: ignore[call-overload]
        path = RESULTS / f"{name}.json"
        path.write_text(json.dumps({"options": options_given, **result}, indent=1) + "\n")
        print(f"written to {path}")
        return 0

    usage = f"python -m benchmarks.{name} [mode ...] [key=value ...]\nmodes: {', '.join(known)}"
    run_job(options, job, what=what, usage=usage, args=rest)


def in_processes(
    function: Callable[[Job], Result], jobs: Sequence[Job], processes: int | None = None
) -> Iterator[Result]:
    """`function` of each job, in their order, each in a process with one thread.

    processes: how many at a time; default: one per core that this process may use.
    """
    workers = min(processes or len(os.sched_getaffinity(0)), len(jobs))
    context = multiprocessing.get_context("spawn")  # a forked torch may hang in its thread pool
    with ProcessPoolExecutor(workers, context, torch.set_num_threads, (1,)) as pool:
        yield from pool.map(function, jobs)


def open_source(
    name: str, root_dir: str | None, tokenizer: TokenizerConfig, seq_len: int, batch: int
) -> Dataset:
    """One prepared source, or the built-in corpus, as a data set of steps of `batch` samples."""
    config = DataConfig(
        root_dir=root_dir, sources={name: 1.0}, seq_len=seq_len, seed=1, tokenizer=tokenizer
    )
    return Dataset(config, build_tokenizer(tokenizer), batch)


def print_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Columns separated by bars, as in Markdown; each row is printed as soon as it is there."""
    widths = [max(len(name), 5) for name in header]
    widths[0] = max(widths[0], 24)

    def line(cells: Sequence[str]) -> str:
        return f"| {' | '.join(c.ljust(w) for c, w in zip(cells, widths, strict=True))} |"

    print(line(header), flush=True)
    print(line(["-" * w for w in widths]), flush=True)
    for row in rows:
        print(line(row), flush=True)
