"""Train a modular language model on a Ray cluster, or on a Ray started here for the job.

The same command continues a run that was interrupted, also with another number of workers.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from modular_lm.cli import run_job
from modular_lm.config import TrainConfig
from modular_lm.data.dataset import check_sources
from modular_lm.errors import AgreedError
from modular_lm.train.driver import drive
from modular_lm.train.dry_run import describe
from modular_lm.train.run import Run, open_run, resolve_config
from ray_jobs._failures import explain

if TYPE_CHECKING:
    from ray.train.torch import TorchTrainer

USAGE = "python -m ray_jobs.train config=configs/debug.yaml key=value ..."


def main(config: TrainConfig, given: dict[str, Any]) -> int:
    """The job: check everything, then train; returns the exit code."""
    resolved, tokenizer = resolve_config(config)
    if config.dry_run:
        check_sources(resolved.data, tokenizer)
        print(describe(resolved, resolved.ray.num_workers))
        return 0
    run = open_run(resolved, tokenizer, resolved.ray.num_workers)
    return drive(run, given, lambda: _fit(run))


def _fit(run: Run) -> int | None:
    """Train on Ray; the step at which it ended, None if it was stopped before it began.

    Raises RunFailedError, AgreedError or ConfigError.
    """
    from ray_jobs._session import SPARE_CPUS, ray_session

    c = run.config.ray
    with ray_session(num_cpus=c.num_workers * c.cpus_per_worker + SPARE_CPUS):
        from ray_jobs._cluster import use_gpu, wait_for_cpus

        on_gpu = use_gpu(c)
        if not wait_for_cpus(c, run.folder.stop_requested):
            return None
        outcome: dict[str, Any] = {}
        # Off the main thread fit() leaves the signal handlers to us.
        fit = _trainer(run, on_gpu).fit
        thread = threading.Thread(target=_call, args=(fit, outcome), daemon=True)
        thread.start()
        while thread.is_alive():
            thread.join(timeout=0.5)
            if run.folder.stop_requested() and not run.events_since_launch("attempt"):
                return None
    if error := outcome.get("raised"):
        message, code = explain(error)
        raise AgreedError(f"{message} (logs: {run.folder.logs})", code) from error
    returned = outcome["result"].return_value
    if "error" in returned:
        raise AgreedError(returned["error"], returned["exit_code"])
    return returned["step"]


def _call(function: Callable[[], Any], outcome: dict[str, Any]) -> None:
    try:
        outcome["result"] = function()
    except BaseException as error:
        outcome["raised"] = error


def _trainer(run: Run, on_gpu: bool) -> TorchTrainer:
    from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    from ray_jobs._events import EventRecorder
    from ray_jobs._ingest import DATASET, PlanDataConfig
    from ray_jobs._worker import train_loop

    c = run.config.ray
    return TorchTrainer(
        train_loop,
        train_loop_config={"run": run, "use_gpu": on_gpu},
        torch_config=TorchConfig(backend="nccl" if on_gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=c.num_workers,
            use_gpu=on_gpu,
            resources_per_worker={"CPU": c.cpus_per_worker, **({"GPU": 1} if on_gpu else {})},
        ),
        run_config=RunConfig(
            name="train",
            storage_path=str(run.folder.ray),
            failure_config=FailureConfig(
                max_failures=c.max_failures, controller_failure_limit=c.max_failures
            ),
            callbacks=[EventRecorder(run.folder)],
            logging_config=LoggingConfig(log_level="WARNING"),
        ),
        # The stream is made by the data config, which knows the world and the start step.
        datasets={DATASET: _no_dataset},
        dataset_config=PlanDataConfig(run),
    )


def _no_dataset() -> Any:
    return None


if __name__ == "__main__":
    run_job(TrainConfig, main, what=__doc__ or "", usage=USAGE)
