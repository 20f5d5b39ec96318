"""A search (`sweep.searcher: optuna`): which suggestions follow from what is known.

Each named arm and point of the grid is a study of its own, with `num_samples` suggestions. The
first half of them, ten at most, are drawn as `searcher: random` draws them; the others come in
rounds of four, which are suggested when all trials of the rounds before have ended. So a suggestion
is a function of the definition and of the results of earlier rounds, whatever ran at the same time.

All that is remembered stands in the trials' own `trial.json`: which suggestions each is the trial
of, and how it stands. A command that continues a sweep makes its studies of these, and of a round
that was written in part the rest, which comes out as it would have.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from modular_lm.errors import ConfigError
from modular_lm.sweep.folder import SweepFolder
from modular_lm.sweep.results import validation_loss
from modular_lm.sweep.space import (
    Study,
    Variant,
    at_random,
    distinct,
    drawn_at_random,
    studies_of,
)
from modular_lm.sweep.tpe import Result, is_possible, suggestion
from modular_lm.sweep.trials import Arm, Plan, Trial, with_variants

ROUND = 4
"""Suggestions of a study that are made at a time, with seeds and studies to fill a cluster. None of
them knows the others' results: fewer learn sooner, and leave more of the cluster idle."""

Made = dict[str, dict[int, Variant]]
"""study -> number -> what was suggested."""


def grown(plan: Plan, folder: SweepFolder, has_ended: Callable[[Trial], bool]) -> Plan:
    """The plan with all suggestions that were made, and with those that can be made now.

    has_ended: whether a trial has, for good. Raises ConfigError where the folder's suggestions are
    of another definition.
    """
    records = folder.records()
    known = {record["arm"] for record in records}
    studies = studies_of(plan.settings, plan.base)
    made = {study.name: _made_before(plan, study, records) for study in studies}
    before = with_variants(plan, _in_order(plan, studies, made), known)
    results = {
        (each.study, each.number): _result(before, folder, arm, each.values, has_ended)
        for arm in before.arms
        for each in arm.suggestions
    }
    for study in studies:
        if study.is_searched:
            earlier = {n: results[study.name, n] for n in made[study.name]}
            made[study.name] |= _next_round(plan, study, earlier)
    return with_variants(plan, _in_order(plan, studies, made), known)


def _in_order(plan: Plan, studies: list[Study], made: Made) -> list[Variant]:
    """All variants: of a study without a search its one, of the others by number."""

    def each() -> Iterator[Variant]:
        for study in studies:
            if study.is_searched:
                yield from (variant for _, variant in sorted(made[study.name].items()))
            else:
                yield study.variant(0, at_random(plan.settings, 0))

    return distinct(each())


# ------------------------------------------------------------------ what is known


def _made_before(plan: Plan, study: Study, records: list[dict[str, Any]]) -> dict[int, Variant]:
    """The suggestions of a study that stand in the trials' files."""
    found: dict[int, Variant] = {}
    for each in (each for record in records for each in record.get("suggestions", [])):
        if each["study"] == study.name and each["number"] < plan.settings.num_samples:
            found[each["number"]] = _again(plan, study, each["number"], each["values"])
    return found


def _again(plan: Plan, study: Study, number: int, values: Mapping[str, Any]) -> Variant:
    """The variant of a suggestion that was made. Raises ConfigError where it could not be."""

    def differs(key: str) -> ConfigError:
        return ConfigError(
            f"dump_dir={plan.folder}: its search was begun otherwise: suggestion {number} of "
            f"{study.name} has {key}={values.get(key, 'not set')}, which is not of this "
            "sweep.params and sweep.search_seed; a search can get more samples, arms and seeds, "
            "but what it has cannot change: use another dump_dir (or name)"
        )

    def draw(key: str, swept: Any) -> Any:
        if key not in values or not is_possible(key, swept, values[key]):
            raise differs(key)
        # The first one is always drawn: another seed or range shows in it.
        if number == 0 and json.dumps(at_random(plan.settings, 0)(key, swept)) != json.dumps(
            values[key]
        ):
            raise differs(key)
        return values[key]

    variant = study.variant(number, draw)
    acting = variant.suggestions[0].values if variant.suggestions else {}
    if more := values.keys() - acting.keys():
        raise differs(min(more))
    return variant


def _result(
    plan: Plan,
    folder: SweepFolder,
    arm: Arm,
    values: dict[str, Any],
    has_ended: Callable[[Trial], bool],
) -> Result:
    """What is known of a suggestion, from all seeds of its arm."""
    trials = [plan.trial(arm, seed) for seed in plan.settings.seeds]
    if not all(has_ended(trial) for trial in trials):
        return Result(values, "running")
    records = [record for trial in trials if (record := folder.read(trial.name))]
    states = {record["status"] for record in records}
    last = [_last_loss(folder, record) for record in records]
    points = [point for point in last if point is not None]
    if "failed" in states or len(points) < len(trials):
        return Result(values, "failed")
    loss = sum(loss for _, loss in points) / len(points)
    if "stopped" in states:
        return Result(values, "stopped", loss, min(step for step, _ in points))
    return Result(values, "done", loss)


def _last_loss(folder: SweepFolder, record: Mapping[str, Any]) -> tuple[int, float] | None:
    """(step, validation loss, inf where it is not finite) of a trial's last validation.

    None where there is none, or a trial that is done has none after its last step.
    """
    found = None
    for line in folder.run(record["name"]).eval_metrics:
        if (loss := validation_loss(line)) is not None:
            found = line["global_step"], loss if math.isfinite(loss) else math.inf
    if found and record["status"] == "done" and found[0] != record["steps"]:
        return None
    return found


# ------------------------------------------------------------------ what comes next


def _next_round(plan: Plan, study: Study, earlier: Mapping[int, Result]) -> dict[int, Variant]:
    """The suggestions that can be made now: nothing while a round before has not ended.

    earlier: by number, of all that were made.
    """
    settings = plan.settings
    first = drawn_at_random(settings)
    missing = [n for n in range(settings.num_samples) if n not in earlier]
    if not missing:
        return {}
    if missing[0] < first:
        return {n: study.variant(n, at_random(settings, n)) for n in missing if n < first}
    start = first + (missing[0] - first) // ROUND * ROUND
    known = [earlier[n] for n in range(start)]
    if any(result.state == "running" for result in known):
        return {}
    made: dict[int, Variant] = {}
    for n in range(start, min(start + ROUND, settings.num_samples)):
        if n in earlier:
            values = earlier[n].values
        else:
            made[n] = study.variant(n, suggestion(study, known, _seed(plan, study, n), first))
            values = made[n].suggestions[0].values
        # Whatever became of it since: the rest of a round is as it would have been.
        known.append(Result(values, "running"))
    return made


def _seed(plan: Plan, study: Study, number: int) -> int:
    text = f"{plan.settings.search_seed}/{study.name}/{number}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")
