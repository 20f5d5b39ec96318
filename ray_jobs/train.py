"""Train a modular language model on a Ray cluster, or on a Ray started here for the job.

The same command continues a run that was interrupted, also with another number of workers.
"""

from __future__ import annotations

import functools
import logging
import threading
from typing import Any

from modular_lm.cli import run_job
from modular_lm.config import TrainConfig
from modular_lm.errors import AgreedError, ConfigError, RunFailedError, reason
from modular_lm.tracking.run_folder import RunFolder
from modular_lm.train.driver import drive
from modular_lm.train.dry_run import describe
from modular_lm.train.run import Run, open_run, resolve_config

log = logging.getLogger(__name__)

USAGE = "python -m ray_jobs.train config=configs/debug.yaml key=value ..."


def main(config: TrainConfig, given: dict[str, Any]) -> int:
    """The job: check everything, then train; returns the exit code."""
    resolved, tokenizer = resolve_config(config)
    if config.dry_run:
        print(describe(resolved, resolved.ray.num_workers))
        return 0
    run = open_run(resolved, tokenizer, resolved.ray.num_workers)
    return drive(run, given, lambda: _fit(run))


def _fit(run: Run) -> None:
    """Train on Ray until done or stopped. Raises RunFailedError, AgreedError or ConfigError."""
    from ray_jobs._session import SPARE_CPUS, ray_session

    c = run.config.ray
    with ray_session(num_cpus=c.num_workers * c.cpus_per_worker + SPARE_CPUS):
        trainer = _trainer(run)
        outcome: dict[str, Any] = {}
        # Off the main thread fit() leaves the signal handlers to us.
        thread = threading.Thread(target=_call, args=(trainer.fit, outcome), daemon=True)
        thread.start()
        while thread.is_alive():
            thread.join(timeout=0.5)
    if error := outcome.get("raised"):
        raise RunFailedError(_explain(error, run)) from error
    returned = outcome["result"].return_value
    if "error" in returned:
        raise AgreedError(returned["error"], returned["exit_code"])


def _call(function: Any, outcome: dict[str, Any]) -> None:
    try:
        outcome["result"] = function()
    except Exception as error:
        outcome["raised"] = error


def _trainer(run: Run) -> Any:
    import ray
    from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    from ray_jobs._ingest import DATASET, PlanDataConfig
    from ray_jobs._worker import train_loop

    c = run.config.ray
    gpus = int(ray.cluster_resources().get("GPU", 0))
    use_gpu = gpus > 0 if c.use_gpu is None else c.use_gpu
    if use_gpu and gpus < c.num_workers:
        raise ConfigError(
            f"ray.num_workers={c.num_workers}: each needs a GPU and the cluster has {gpus}; "
            "use fewer workers, or ray.use_gpu=false to train on CPUs"
        )
    cpus, needed = int(ray.cluster_resources().get("CPU", 0)), c.num_workers * c.cpus_per_worker
    if cpus <= needed:
        # A cluster may grow; on one that does not, the workers would wait for ever.
        log.warning(
            "%d workers need %d CPUs and the data tasks some more, the cluster has %d: "
            "training starts when it has grown",
            c.num_workers,
            needed,
            cpus,
        )
    return TorchTrainer(
        train_loop,
        train_loop_config={"run": run},
        torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=c.num_workers,
            use_gpu=use_gpu,
            resources_per_worker={"CPU": c.cpus_per_worker, **({"GPU": 1} if use_gpu else {})},
        ),
        run_config=RunConfig(
            name="train",
            storage_path=str(run.folder.ray),
            failure_config=FailureConfig(
                max_failures=c.max_failures, controller_failure_limit=c.max_failures
            ),
            callbacks=[_failure_recorder(run.folder)],
            logging_config=LoggingConfig(log_level="WARNING"),
        ),
        # The stream is made by the data config, which knows the world and the start step.
        datasets={DATASET: _no_dataset},
        dataset_config=PlanDataConfig(
            run.dataset, run.stop_step, run.global_batch_size, functools.partial(_begin, run)
        ),
    )


def _begin(run: Run, world_size: int) -> int:
    return run.begin_attempt(world_size)


def _no_dataset() -> Any:
    return None


def _failure_recorder(folder: RunFolder) -> Any:
    """A Ray Train callback that writes crashes of workers to the event log."""
    from ray.train import UserCallback

    class FailureRecorder(UserCallback):
        def after_exception(
            self, run_context: Any, worker_exceptions: dict[int, Exception]
        ) -> None:
            attempt = (folder.last_event("attempt") or {}).get("attempt")
            ranks = sorted(worker_exceptions)
            folder.append_event(
                "failure",
                attempt=attempt,
                ranks=ranks,
                reason=reason(worker_exceptions[ranks[0]]),
            )

    return FailureRecorder()


def _explain(error: Exception, run: Run) -> str:
    """One line for a training that Ray gave up: the first worker's reason, and where to look."""
    failures = getattr(error, "worker_failures", None) or {}
    cause = failures[min(failures)] if failures else error
    return f"training failed: {reason(cause)}; see {run.folder.events_file} and {run.folder.logs}"


if __name__ == "__main__":
    run_job(TrainConfig, main, what=__doc__ or "", usage=USAGE)
