"""What a step of each variant takes, by a pilot: a short run alone (`sweep.budget: wall`).

A schedule needs its number of steps beforehand, and seconds say nothing of it. So a variant is
first run for `PILOT_STEPS`, and what was measured stands in the `trial.json` of its trials from
then on: it is measured once, and a sweep that continues, perhaps on another machine, has the
numbers of steps that it had. Variants that differ only in what costs no time, such as learning
rates, share one pilot: two measurements would give them different steps. Who runs pilots is
`ray_jobs._pilots`.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from modular_lm.config.checks import flatten
from modular_lm.config.load import from_dict, set_key, to_dict, to_yaml
from modular_lm.config.schema import TrainConfig
from modular_lm.errors import RunFailedError
from modular_lm.sweep.budget import steps_within
from modular_lm.sweep.folder import SweepFolder
from modular_lm.sweep.trials import Arm, Plan
from modular_lm.tracking.run_folder import RunFolder, metric_values

PILOT_STEPS = 50
# The first steps compile, fill caches and start readers.
_WARMING = 10
# More often than this a metrics line would cost time that the trials don't spend.
_LINE_EVERY = 5
# Keys and groups of a run that a step takes the same time with, whatever they are; and those that
# it does not.
_TIMELESS = (
    *("name", "dump_dir", "seed", "steps", "stop_at", "data.seed"),
    *("checkpoint", "eval", "logging", "optim"),
)
_TIMED = ("optim.name", "optim.muon_ns_steps")


def pilot_given(plan: Plan, arm: Arm) -> dict[str, Any]:
    """What a training job is given to run an arm's pilot: its first trial, cut short, which
    validates nothing and keeps nothing."""
    given = copy.deepcopy(plan.trial(arm, plan.settings.seeds[0]).given)
    base = from_dict(TrainConfig, plan.base)
    own = {
        "name": f"pilot-{arm.name}",
        "dump_dir": str(SweepFolder(plan.folder).pilot(arm.name).path),
        # The schedules are those of the base; steps cost the same wherever they are in one.
        "steps": max(PILOT_STEPS, base.steps),
        "stop_at": PILOT_STEPS,
        "checkpoint.path": None,
        "checkpoint.dump.every": 0,
        "checkpoint.eval.every": 0,
        "checkpoint.rolling.minutes": 0,
        "eval.validation.max_docs": 0,
        "logging.freq": min(_LINE_EVERY, base.logging.freq),
        "logging.mlflow.enabled": False,
    }
    for key, value in own.items():
        set_key(given, key, value)
    return given


def seconds_per_step(run: RunFolder) -> tuple[float, float, float]:
    """The median, the least and the most of the metrics lines of a pilot, once it is warm.

    Raises RunFailedError where it has none.
    """
    found = [
        metric_values(line)["speed/curr_iter_time"]
        for line in run.metrics
        if line["global_step"] > _WARMING
    ]
    if not found:
        raise RunFailedError(f"{run.path}: a pilot without metrics of its steps")
    return float(np.median(found)), min(found), max(found)


def with_seconds(plan: Plan) -> Plan:
    """The plan with the steps of all arms that were measured, or one that takes the same time.

    Raises DataError for a `trial.json` that cannot be read.
    """
    if plan.settings.budget != "wall":
        return plan
    timed = [r for r in SweepFolder(plan.folder).records() if r.get("seconds_per_step")]
    # Those of the plan are what they were, or are refused; of others it is to be seen.
    names = {trial.name for trial in plan.trials}
    own = {r["arm"]: r["seconds_per_step"] for r in timed if r["name"] in names}
    alike = {_takes(r["given"]): r["seconds_per_step"] for r in timed}

    def known(arm: Arm) -> Arm:
        seconds = own.get(arm.name) or alike.get(_takes_of(plan, arm))
        if arm.config is None or seconds is None:
            return arm
        return replace(arm, seconds_per_step=seconds, steps=steps_within(plan.amount, seconds))

    return replace(plan, arms=[known(arm) for arm in plan.arms])


def unmeasured(plan: Plan) -> list[list[Arm]]:
    """The arms that need a pilot before they can be trained; those that share one together."""
    found: dict[str, list[Arm]] = {}
    for arm in plan.arms:
        if arm.config is not None and arm.steps is None:
            found.setdefault(_takes_of(plan, arm), []).append(arm)
    return list(found.values())


def _takes_of(plan: Plan, arm: Arm) -> str:
    return _takes(plan.trial(arm, plan.settings.seeds[0]).given)


def _takes(given: Mapping[str, Any]) -> str:
    """The same for trials a step of which takes the same time. given: as in `trial.json`."""
    keys = flatten(to_dict(from_dict(TrainConfig, dict(given))))
    return to_yaml({k: v for k, v in keys.items() if k in _TIMED or not _is_timeless(k)})


def _is_timeless(key: str) -> bool:
    return any(key == each or key.startswith(f"{each}.") for each in _TIMELESS)
