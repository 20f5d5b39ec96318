"""The function that Ray Train runs on every worker."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Generator
from typing import Any

import ray.train

from modular_lm.cli import setup_logging
from modular_lm.data.dataset import LocalLoader, StepRows
from modular_lm.errors import AgreedError
from modular_lm.parallel import init_world
from modular_lm.train.run import Run
from modular_lm.train.worker import train_rank
from ray_jobs._ingest import DATASET, ReadAhead, Stream


def train_loop(loop_config: dict[str, Any]) -> dict[str, Any]:
    """One rank of one attempt. loop_config: {"run": Run, "use_gpu": bool}.

    Returns {"step"} at which training ended; a failure that all ranks agree on is returned too, as
    {"error"}, because Ray would take an exception for a crash.
    """
    run: Run = loop_config["run"]
    context = ray.train.get_context()
    rank = context.get_world_rank()
    setup_logging(rank, run.folder.log_file(rank))
    logging.getLogger("ray.train").setLevel(logging.WARNING)
    stream: Any = ray.train.get_dataset_shard(DATASET)
    if stream is None:
        return {"step": run.stop_step}
    try:
        world = init_world(run.config.distributed, use_gpu=loop_config["use_gpu"])
        with contextlib.closing(_steps(run, stream, world.data_rank)) as steps:
            outcome = train_rank(run, world, stream.start, steps, _report)
    except AgreedError as error:
        return {"error": error}
    return {"step": outcome.step}


def _steps(run: Run, stream: Stream, rank: int) -> ReadAhead | Generator[StepRows]:
    """The rows of a data-parallel rank, read ahead by Ray Data or, as `data.loader` says, by this
    process."""
    if run.config.data.loader == "local":
        loader = LocalLoader(run.dataset, run.global_batch_size, rank, stream.world_size)
        return loader.steps(stream.start, stream.stop)
    return ReadAhead(run.dataset, stream, rank)


def _report(kind: str, fields: dict[str, Any]) -> None:
    """Hand an event to the driver's side, which writes the log (`EventRecorder`).

    Ray's own checkpoint manager is not used: a checkpoint is a fact among others.
    """
    ray.train.report({"event": kind, **fields})
