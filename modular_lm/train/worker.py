"""What every rank of an attempt does, whoever started it and wherever its batches come from."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from modular_lm.data.dataset import StepRows
from modular_lm.eval.perplexity import Validation
from modular_lm.files import lock
from modular_lm.parallel import World
from modular_lm.train.run import Run
from modular_lm.train.trainer import Callbacks, Outcome, Trainer
from modular_lm.train.watchdog import Watchdog


def train_rank(
    run: Run,
    world: World,
    start_step: int,
    steps: Iterator[StepRows],
    record: Callable[[str, dict[str, Any]], None],
    hung: Callable[[], None] | None = None,
) -> Outcome:
    """Build the model, resume at `start_step`, train to `run.stop_step`. A collective.

    record: takes the events `checkpoint` and `validation` with their fields; called on every
    rank. Metrics files are written by rank 0. hung: called before the process is ended because
    training stands still.
    """
    c, folder, leads = run.config, run.folder, world.rank == 0

    def metrics(line: dict[str, Any]) -> None:
        if leads:
            folder.metrics.append({**line, **run.describe_data(line["global_step"])})

    def evaluation(line: dict[str, Any]) -> None:
        if leads:
            folder.eval_metrics.append(line)
        scores = {k: v for k, v in line.items() if k.endswith(("/nll", "/bpb"))}
        record("validation", {"step": line["global_step"], **scores})

    def saved(checkpoint: dict[str, Any]) -> None:
        record("checkpoint", checkpoint)

    def stop() -> str | None:
        return folder.stop_or_regroup_requested() if leads else None

    mark, watchdog = folder.last_step, Watchdog(folder, world.rank, c.hang_timeout_s, hung)

    def stepped(step: int) -> None:
        watchdog.beat(step)
        if leads:
            mark.write(step)

    with contextlib.closing(watchdog), _alone(run, world):
        trainer = Trainer(
            c,
            world,
            folder,
            run.tokenizer,
            run.global_batch_size,
            Callbacks(metrics, evaluation, saved, stop, stepped, record, watchdog.phase),
            _validation(run),
        )
        trainer.resume(start_step)
        if leads:
            # Steps that an earlier attempt did after this checkpoint are done, and written, again.
            folder.metrics.cut_after(start_step)
            folder.eval_metrics.cut_after(start_step)
        return trainer.run(steps, run.stop_step)


def _validation(run: Run) -> Validation | None:
    c = run.config
    if c.eval.validation.max_docs == 0:
        return None
    return Validation(
        run.dataset.folders,
        run.tokenizer,
        c.data.seq_len,
        c.eval.validation.max_docs,
        c.eval.validation.batch_size or c.data.batch_size,
        c.eval.validation.chunk_len or c.model.module_seq_len,
    )


@contextlib.contextmanager
def _alone(run: Run, world: World) -> Iterator[None]:
    """Let no two worker groups write to the run's folder.

    The workers of a driver that was killed live on for some seconds; the next attempt waits here
    until their rank 0 is gone. A collective.
    """
    with contextlib.ExitStack() as stack:

        def wait() -> None:
            if world.rank == 0:
                stack.enter_context(lock(run.folder.ray / "writer.lock"))

        world.together(wait, "waiting for the workers of an earlier attempt")
        yield
