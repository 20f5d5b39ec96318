"""Sweeps whose trials were not trained but written, through the run folder's own functions."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from modular_lm.config import SweepConfig, load_config, to_dict, to_yaml
from modular_lm.eval.documents import DocumentScores, write_documents
from modular_lm.sweep.folder import SweepFolder
from modular_lm.sweep.trials import Plan, Trial, plan_sweep
from tests.support import REPO

DEBUG = str(REPO / "configs" / "debug.yaml")
DOCUMENTS = 40

Loss = Callable[[Trial], float]


def planned(folder: Path, *args: str) -> tuple[SweepConfig, dict[str, Any], Plan]:
    """A sweep over configs/debug.yaml, planned."""
    given_args = [f"config={DEBUG}", "name=made", f"dump_dir={folder}", *args]
    config, given = load_config(SweepConfig, given_args)
    return config, given, plan_sweep(config, given)


def begun(folder: Path, *args: str) -> tuple[SweepFolder, Plan]:
    """Its folder, with trials that are pending."""
    config, _, plan = planned(folder, *args)
    made = SweepFolder(folder)
    made.begin(plan, config)
    return made, plan


def finish(folder: SweepFolder, trial: Trial, loss: float, points: int = 10) -> None:
    """Write what a trial that is done leaves: its last validation loss is `loss`."""
    folder.update(trial.name, "running")
    write_run(folder, trial, loss, points)
    folder.update(trial.name, "done")


def write_run(folder: SweepFolder, trial: Trial, loss: float, points: int = 10) -> None:
    run, arm = folder.run(trial.name), trial.arm
    assert arm.config is not None
    assert arm.steps is not None
    run.create()
    run.config.write_text(to_yaml(to_dict(arm.config)))
    noise = random.Random(trial.name)
    seconds = 1e-6 * arm.config.data.seq_len * (1 + 0.1 * len(arm.name) % 3)
    for i in range(1, 41):
        step = max(1, round(i * arm.steps / 40))
        run.metrics.append(
            {
                "global_step": step,
                "loss/out": loss + 2 / i + noise.gauss(0, 0.05),
                "speed/wps": 2e4 / (1 + len(arm.name) % 3) + noise.gauss(0, 500),
                "speed/curr_iter_time": seconds,
                "memory/rss": 400.0 + len(arm.name) + i / 10,
            }
        )
    for i in range(1, points + 1):
        step = round(i * arm.steps / points)
        at = loss + 0.8 * (points / i - 1) / points + (noise.gauss(0, 0.01) if i < points else 0)
        nll = {"validation/builtin/nll": at, "validation/builtin/bpb": at * 1.4427}
        run.eval_metrics.append({"global_step": step, **nll})
    write_documents(run.documents_file(arm.steps), arm.steps, {"builtin": document_scores(loss)})


def document_scores(loss: float) -> DocumentScores:
    """Documents of a mean loss per token, hard and easy ones, the same in every trial."""
    generator = random.Random(0)
    tokens = [generator.randint(20, 400) for _ in range(DOCUMENTS)]
    offsets = [generator.gauss(0, 0.3) for _ in tokens]
    own = random.Random(str(loss))
    each = [loss + offset + own.gauss(0, 0.02) for offset in offsets]
    return DocumentScores([a * n for a, n in zip(each, tokens, strict=True)], tokens)


def finish_all(folder: SweepFolder, plan: Plan, losses: Mapping[str, Any] | Loss) -> None:
    """All trials that can run, with `losses` by arm (a list: by seed) or from a function."""
    for trial in plan.trials:
        if trial.arm.why is None:
            finish(folder, trial, _loss(losses, plan, trial))


def _loss(losses: Mapping[str, Any] | Loss, plan: Plan, trial: Trial) -> float:
    if callable(losses):
        return losses(trial)
    return losses[trial.arm.name][plan.settings.seeds.index(trial.seed)]
