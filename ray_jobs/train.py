"""Train a modular language model on a Ray cluster, or on a Ray started here for the job.

The same command continues a run that was interrupted, also with another number of workers.
"""

from __future__ import annotations

from typing import Any

from modular_lm.cli import run_job
from modular_lm.config import TrainConfig
from modular_lm.config.checks import world_sizes
from modular_lm.data.dataset import check_sources
from modular_lm.train.driver import drive
from modular_lm.train.dry_run import describe
from modular_lm.train.run import Run, open_run, resolve_config

USAGE = "python -m ray_jobs.train config=configs/debug.yaml key=value ..."


def main(config: TrainConfig, given: dict[str, Any]) -> int:
    """The job: check everything, then train; returns the exit code."""
    resolved, tokenizer = resolve_config(config)
    # The global batch is that of the largest world.
    most = world_sizes(resolved.ray)[1]
    if config.dry_run:
        check_sources(resolved.data, tokenizer)
        print(describe(resolved, most))
        return 0
    run = open_run(resolved, tokenizer, most)
    return drive(run, given, lambda: _train(run))


def _train(run: Run) -> int | None:
    from ray_jobs._session import SPARE_CPUS, ray_session

    c = run.config.ray
    with ray_session(num_cpus=world_sizes(c)[1] * c.cpus_per_worker + SPARE_CPUS):
        from ray_jobs._attempts import run_attempts

        return run_attempts(run)


if __name__ == "__main__":
    run_job(TrainConfig, main, what=__doc__ or "", usage=USAGE)
