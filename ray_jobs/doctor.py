"""Look for what would make a job fail, before any GPU hour is spent; leaves nothing behind.

Takes the command line of the job that is meant: all keys but the two below are the job's own.
Prints one table (ok, warning, error, and what to do) and exits 2 if it holds an error. After a
mistake it goes on with what can still be looked at.

Where there is RAY_ADDRESS, that cluster is asked; submit the doctor itself (`ray job submit`) to
see the cluster with its own eyes.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import json
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from modular_lm.cli import run_job
from modular_lm.config import (
    JOBS,
    DoctorConfig,
    PrepareConfig,
    SweepConfig,
    TrainConfig,
    load_config,
)
from modular_lm.config.checks import dump_dir_of
from modular_lm.config.load import from_dict
from modular_lm.data.hub import on_disk
from modular_lm.data.prepare import plan_sources
from modular_lm.errors import EXIT_BAD_INPUT, EXIT_DONE, ConfigError, UserFacingError, reason
from modular_lm.submission import check_lasting
from modular_lm.sweep.trials import plan_sweep
from ray_jobs._checks import Finding, dump_dir_finding, training_findings
from ray_jobs._site_checks import (
    device_gib,
    gpu_finding,
    mlflow_finding,
    network_finding,
    ray_findings,
    slurm_findings,
    version_findings,
)

USAGE = "python -m ray_jobs.doctor config=configs/debug.yaml key=value ..."
_OWN = ("script", "device_memory")


def diagnose(rest: Sequence[str], config: DoctorConfig, given: dict[str, Any]) -> int:
    """The job: all findings about the job whose arguments are `rest`; returns the exit code."""
    script = Path(config.script) if Path(config.script).is_file() else None
    plan = _plan_beside(script) if script else {}
    module = plan.get("script", "ray_jobs.train") if script else config.script
    if module not in JOBS:
        close = difflib.get_close_matches(module, JOBS, n=1)
        hint = f"did you mean {close[0]}?" if close else f"one of {', '.join(JOBS)}"
        raise ConfigError(f"script={module}: neither a file nor a job; {hint}")
    if plan and not any(arg.startswith("config=") for arg in rest):
        rest = [*plan["arguments"], *rest]
    with _no_log():
        found = [*version_findings(), *_job(JOBS[module], rest, config), *slurm_findings(script)]
    if plan and not os.environ.get("RAY_ADDRESS"):
        # What can be started on this machine says nothing of the nodes.
        found = [row for row in found if row.check not in ("ray", "gpu")]
        found.append(Finding("ray", "ok", "the batch script starts one on the nodes of its job"))
    print(format_table(found), flush=True)
    return EXIT_BAD_INPUT if any(row.level == "error" for row in found) else EXIT_DONE


def _plan_beside(script: Path) -> dict[str, Any]:
    """The plan of a batch script of our launcher: its job and the arguments; empty for others."""
    try:
        plan = json.loads((script.parent / "ray" / "slurm" / "plan.json").read_text())
        return {"script": plan["script"], "arguments": plan.get("arguments", [])}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _job(cls: type, rest: Sequence[str], own: DoctorConfig) -> list[Finding]:
    try:
        config, given = load_config(cls, rest)
    except UserFacingError as error:
        found = [Finding("config", "error", str(error))]
        # Without a config what is around the job can be looked at.
        return [*found, *ray_findings(1, None, Path.cwd())]
    if isinstance(config, SweepConfig):
        return _sweep(config, given, own.device_memory)
    if isinstance(config, TrainConfig):
        return _train(config, own.device_memory)
    if isinstance(config, PrepareConfig):
        return _prepare(config)
    return [_loaded(config)]


def _sweep(config: SweepConfig, given: dict[str, Any], device: float | None) -> list[Finding]:
    """The plan, and all about the first trial of its baseline."""
    try:
        plan = plan_sweep(config, given)
    except UserFacingError as error:
        return [Finding("sweep", "error", str(error)), *ray_findings(1, None, Path.cwd())]
    variants = f"{len(plan.arms)} variants x {len(plan.settings.seeds)} seeds"
    found = [Finding("sweep", "ok", f"{variants}; below: a trial of {plan.baseline}")]
    found += [
        Finding("sweep", "warning", f"{arm.name} cannot be trained: {arm.why}", "leave it out")
        for arm in plan.arms
        if arm.config is None
    ]
    return found + _train(from_dict(TrainConfig, plan.first_of_baseline.given), device)


def _train(config: TrainConfig, device: float | None) -> list[Finding]:
    sizes, use_gpu = config.ray.num_workers, config.ray.use_gpu
    # Its row says it where these make no sense; what is around the job is looked at all the same.
    workers = max(1, sizes if isinstance(sizes, int) else min(sizes, default=1))
    folder = Path(dump_dir_of(config)).expanduser().absolute()
    here = not os.environ.get("RAY_ADDRESS")
    found = training_findings(config, device or (device_gib(use_gpu, workers) if here else None))
    if here:
        found.append(gpu_finding(use_gpu, workers))
    found += ray_findings(workers, use_gpu, folder)
    token = config.data.tokenizer
    named = token.name == "tiktoken" and not Path(token.path or "").expanduser().is_file()
    # A rank file by name is in tiktoken's cache by now, or its row says that it cannot be had.
    cached = all(row.level != "error" for row in found if row.check == "tokenizer")
    advice = "where there is internet run this, with TIKTOKEN_CACHE_DIR set to a folder of both"
    found.append(network_finding({f"tiktoken {token.path}": cached} if named else {}, advice))
    return [*found, mlflow_finding(config, folder)]


def _prepare(config: PrepareConfig) -> list[Finding]:
    found = [_loaded(config)]
    needs = on_disk(config)
    if needs:
        advice = "where there is internet run the same job with download_only=true"
        found.append(network_finding(needs, advice))
    else:
        try:
            sources = [] if config.src == "builtin" else plan_sources(config)
            for plan in sources:
                state = "done already" if plan.done else "to be prepared"
                found.append(Finding("data", "ok", f"{plan.folder.name}: {state}"))
        except (UserFacingError, OSError) as error:
            found.append(Finding("data", "error", reason(error)))
    folder = Path(config.dst or ".").expanduser().absolute()
    if config.dst is not None:
        found.append(dump_dir_finding(folder))
    return [*found, *ray_findings(1, None, folder)]


def _loaded(config: Any) -> Finding:
    try:
        check_lasting(config)
    except UserFacingError as error:
        return Finding("config", "error", str(error))
    return Finding("config", "ok", "its keys agree")


@contextlib.contextmanager
def _no_log() -> Iterator[None]:
    """Warnings stand in the table; the log would show them a second time."""

    def nothing(record: logging.LogRecord) -> bool:
        return False

    handlers = list(logging.getLogger().handlers)
    for handler in handlers:
        handler.addFilter(nothing)
    try:
        yield
    finally:
        for handler in handlers:
            handler.removeFilter(nothing)


def format_table(found: Sequence[Finding]) -> str:
    """One line per finding, below it what to do; at the end how many there are of each level."""
    width = max(len(row.check) for row in found)
    lines = []
    for row in found:
        lines.append(f"{row.level:<7}  {row.check:<{width}}  {row.text}")
        if row.advice and row.level != "ok":
            lines.append(f"{'':<7}  {'':<{width}}  -> {row.advice}")
    counts = {level: sum(row.level == level for row in found) for level in ("error", "warning")}
    said = [f"{n} {level}{'s' * (n != 1)}" for level, n in counts.items() if n]
    return "\n".join([*lines, ", ".join(said) or "nothing stands in the way"])


def main(args: Sequence[str]) -> NoReturn:
    """Give the doctor its keys, and the job the rest."""
    asks = [a for a in args if a in ("-h", "--help", "help")]
    own = [a for a in args if a.partition("=")[0].lstrip("-") in _OWN]
    rest = [a for a in args if a not in own and a not in asks]
    job = functools.partial(diagnose, rest)
    run_job(DoctorConfig, job, what=__doc__ or "", usage=USAGE, args=[*own, *asks])


if __name__ == "__main__":
    main(sys.argv[1:])
