"""The function that Ray Train runs on every worker."""

from __future__ import annotations

import itertools
import logging
from typing import Any

import ray.train

from modular_lm.cli import setup_logging
from modular_lm.errors import EXIT_BAD_INPUT, AgreedError
from modular_lm.parallel import init_world
from modular_lm.train.run import Run
from modular_lm.train.worker import train_rank
from ray_jobs._ingest import DATASET, deliveries_to_steps


def train_loop(loop_config: dict[str, Any]) -> dict[str, Any]:
    """One rank of one attempt. loop_config: {"run": Run, "use_gpu": bool}.

    Returns {"step"} at which training ended; a failure that all ranks agree on is returned too, as
    {"error", "exit_code"}, because Ray would take an exception for a crash and try again.
    """
    run: Run = loop_config["run"]
    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    setup_logging(rank, run.folder.log_file(rank))
    logging.getLogger("ray.train").setLevel(logging.WARNING)
    for failure in run.events_since_launch("failure"):
        if failure["exit_code"] == EXIT_BAD_INPUT:
            # Another attempt would meet the same input.
            return {"error": failure["reason"], "exit_code": EXIT_BAD_INPUT}
    shard: Any = ray.train.get_dataset_shard(DATASET)
    if shard is None:
        return {"step": run.stop_step}
    steps = deliveries_to_steps(
        shard.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=1),
        seq_len=run.config.data.seq_len,
        global_batch_size=run.global_batch_size,
        rank=rank,
        world_size=world_size,
    )
    try:
        world = init_world(loop_config["use_gpu"])
        # The stream begins at the step that the driver's side chose for this attempt.
        first = next(steps)
        outcome = train_rank(run, world, first.step, itertools.chain([first], steps), _report)
    except AgreedError as error:
        return {"error": str(error), "exit_code": error.exit_code}
    return {"step": outcome.step}


def _report(kind: str, fields: dict[str, Any]) -> None:
    """Hand an event to the driver's side, which writes the log (`EventRecorder`).

    Ray's own checkpoint manager is not used: a checkpoint is a fact among others.
    """
    ray.train.report({"event": kind, **fields})
