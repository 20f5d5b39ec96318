"""What every rank of an attempt does, whoever started it and wherever its batches come from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from modular_lm.data.dataset import StepRows
from modular_lm.eval.perplexity import Validation
from modular_lm.parallel import World
from modular_lm.train.run import Run
from modular_lm.train.trainer import Callbacks, Outcome, Trainer


def train_rank(
    run: Run,
    world: World,
    start_step: int,
    steps: Iterator[StepRows],
    on_saved: Callable[[dict[str, Any]], None],
) -> Outcome:
    """Build the model, resume at `start_step`, train to `run.stop_step`. A collective.

    on_saved: called on every rank after each checkpoint. Files of the run are written by rank 0.
    """
    c, folder, leads = run.config, run.folder, world.rank == 0
    validation = None
    if c.eval.validation.max_docs:
        validation = Validation(
            run.dataset.folders,
            run.tokenizer,
            c.data.seq_len,
            c.eval.validation.max_docs,
            c.eval.validation.batch_size or c.data.batch_size,
        )

    def metrics(line: dict[str, Any]) -> None:
        if leads:
            folder.metrics.append({**line, **run.describe_data(line["global_step"])})

    def evaluation(line: dict[str, Any]) -> None:
        if leads:
            folder.eval_metrics.append(line)
            scores = {k: v for k, v in line.items() if k.endswith(("/nll", "/bpb"))}
            folder.append_event("validation", step=line["global_step"], **scores)

    def saved(checkpoint: dict[str, Any]) -> None:
        if leads:
            folder.append_event("checkpoint", **checkpoint)
        on_saved(checkpoint)

    def stop() -> str | None:
        return folder.stop_requested() if leads else None

    trainer = Trainer(
        c,
        world,
        folder,
        run.tokenizer,
        run.global_batch_size,
        Callbacks(metrics, evaluation, saved, stop),
        validation,
    )
    trainer.resume(start_step)
    if leads:
        # Steps that an earlier attempt did after this checkpoint are done, and written, again.
        folder.metrics.cut_after(start_step)
        folder.eval_metrics.cut_after(start_step)
    return trainer.run(steps, run.stop_step)
