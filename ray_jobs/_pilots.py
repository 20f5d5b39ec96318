"""The pilots of a sweep whose budget is seconds (`modular_lm.sweep.pilots`), run one after another.

In the sweep's own process, as `ray_jobs.train` runs a job: what of the sweep ran beside a pilot
would be measured with it.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
import threading
from collections.abc import Iterator

from modular_lm.config import TrainConfig
from modular_lm.config.checks import world_sizes
from modular_lm.config.load import from_dict
from modular_lm.errors import EXIT_DONE
from modular_lm.sweep.folder import SweepFolder
from modular_lm.sweep.pilots import pilot_given, seconds_per_step
from modular_lm.sweep.trials import Arm, Plan
from modular_lm.tracking.run_folder import RunFolder
from modular_lm.train.driver import drive
from modular_lm.train.run import open_run, resolve_config
from ray_jobs._attempts import run_attempts

log = logging.getLogger(__name__)

_LOOK_EVERY_S = 0.5


def run_pilot(plan: Plan, arm: Arm, sweep: RunFolder) -> float | None:
    """Run an arm's pilot from the beginning; returns its seconds per step, None if it was stopped.

    sweep: where a stop is asked for. Raises what a training run raises.
    """
    given = pilot_given(plan, arm)
    folder = SweepFolder(plan.folder).pilot(arm.name)
    # What is left of one that was interrupted would be measured as another start.
    shutil.rmtree(folder.path, ignore_errors=True)
    resolved, tokenizer = resolve_config(from_dict(TrainConfig, given))
    run = open_run(resolved, tokenizer, world_sizes(resolved.ray)[1])
    log.info("%s: pilot of %d steps", arm.name, run.stop_step)
    with _passed_on(sweep, folder):
        code = drive(run, given, lambda: run_attempts(run), sinks=[])
    if code != EXIT_DONE:
        return None
    shutil.rmtree(folder.path / "checkpoints", ignore_errors=True)
    seconds, least, most = seconds_per_step(folder)
    # Far apart they say that the machine is busy with something else.
    log.info("%s: %.4g s per step (%.4g to %.4g)", arm.name, seconds, least, most)
    return seconds


@contextlib.contextmanager
def _passed_on(sweep: RunFolder, pilot: RunFolder) -> Iterator[None]:
    """Meanwhile a request to stop the sweep is one to stop the pilot."""
    over = threading.Event()

    def attend() -> None:
        while not over.wait(_LOOK_EVERY_S):
            asked = sweep.stop_requested()
            if asked and pilot.stop_requested() is None:
                pilot.request_stop(asked)

    thread = threading.Thread(target=attend, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
