"""Training without Ray: `torchrun ... -m modular_lm.train config=...`, or one plain process.

    torchrun --nproc-per-node 2 -m modular_lm.train config=configs/debug.yaml
    python -m pdb -m modular_lm.train config=configs/debug.yaml

The same run folder, the same batches, the same weights as under `ray_jobs.train`; the number of
ranks is torchrun's (`ray.num_workers` is not used) and batches are read in process.
"""

from __future__ import annotations

import os
import socket
from functools import partial
from typing import Any

from modular_lm.cli import leave, run_job, setup_logging
from modular_lm.config import TrainConfig
from modular_lm.data.dataset import LocalLoader, check_sources
from modular_lm.train.driver import drive, end_hung, stop_on_signals
from modular_lm.train.dry_run import describe
from modular_lm.train.run import Run, open_run, resolve_config

USAGE = "[torchrun --nproc-per-node N] -m modular_lm.train config=FILE key=value ..."


def main(config: TrainConfig, given: dict[str, Any]) -> int:
    """One rank of a run; rank 0 also attends it."""
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if rank:
        setup_logging(rank)
    resolved, tokenizer = resolve_config(config)
    if config.dry_run:
        check_sources(resolved.data, tokenizer)
        if rank == 0:
            print(describe(resolved, size))
        return 0
    run = open_run(resolved, tokenizer, size)
    if rank == 0:
        return drive(run, given, lambda: _train(run))
    if not run.is_complete:
        with stop_on_signals(run.folder):
            _train(run)
    return 0


def _train(run: Run) -> int:
    import torch.distributed as dist

    from modular_lm.parallel import init_world
    from modular_lm.train.worker import train_rank

    world = init_world(run.config.distributed)

    def record(kind: str, fields: dict[str, Any]) -> None:
        if world.rank == 0:
            run.folder.append_event(kind, **fields)

    try:
        hosts = world.gather(socket.gethostname())
        start = world.broadcast(run.begin_attempt(hosts) if world.rank == 0 else None)
        loader = LocalLoader(run.dataset, run.global_batch_size, world.data_rank, world.data_size)
        steps = loader.steps(start, run.stop_step)
        hung = partial(end_hung, run, world.size) if world.rank == 0 else None
        return train_rank(run, world, start, steps, record, hung).step
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    try:
        run_job(TrainConfig, main, what=__doc__ or "", usage=USAGE)
    except SystemExit as end:
        leave(int(end.code or 0))
