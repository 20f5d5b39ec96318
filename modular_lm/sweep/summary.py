"""A sweep as one table of arms and their curves: plain data, which `report.json` holds.

Only trials that are done count, and a variant is compared as a whole or not at all: no p-value
while it or the baseline lacks a seed, for the seeds that are left may favour it (those of the
others may have diverged). Nor are losses compared that are of other documents, or of the same ones
cut or tokenized otherwise. `report.json`:

    format, name, created_at, budget, amount, seeds, baseline, searcher, scheduler, iso_parameters,
    confidence
    flops_spread     how much the most expensive trial spent above the cheapest one, as a share
    arms             in the definition's order, each with
        name, values, baseline, trials, done, steps, tokens, flops, model
        nll, bpb         {mean, low, high, n, by_seed}: validation, nats per token, bits per byte
        comparable       whether its trials scored the baseline's documents, as the same tokens
        rank             1 for the best of those with a loss; those that lack seeds come later, and
                         those that are not comparable last
        difference       {mean, low, high, n, p, p_holm}: nll less the baseline's, by seed
        untested         why there is no p, of all but the baseline
        documents        seed -> {mean, low, high, n}: the same within a seed, over documents
        tokens_per_second, memory_mib, memory_kind
        seconds          of training that a trial took, the mean over those that are done
        flops_per_token, parameters, ffn_dim, cache_bytes_per_token
        pareto           whether no other arm has both a lower loss and a smaller cache; of arms
                         that are comparable and have all seeds
    excluded         {trial, arm, seed, status, why} of all others
    curves           {what, arms: name -> {step, tokens, flops, seconds, mean, low, high}}

`low` and `high` are ends of 95 % confidence intervals, null with one seed.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import numpy as np

from modular_lm.config.sweep import closest
from modular_lm.errors import ConfigError
from modular_lm.sweep.folder import SweepFolder
from modular_lm.sweep.results import Documents, Lines, TrialResult, read_results
from modular_lm.sweep.statistics import (
    CONFIDENCE,
    FEWEST_FOR_P,
    Interval,
    bootstrap_difference,
    holm,
    mean_interval,
    paired,
)

FORMAT = 1
_FEWEST_POINTS = 3  # validations that make a curve; with fewer the training loss is drawn
_MOST_POINTS = 60
_COSTS = ("flops_per_token", "parameters", "ffn_dim", "cache_bytes_per_token")
_MODEL = (
    "dim",
    "n_layers",
    "module_agg",
    "module_seq_len",
    "module_n_summary",
    "module_lookback",
    "sliding_window",
    "seq_len",
)


def summarise(folder: SweepFolder, baseline: str | None = None) -> dict[str, Any]:
    """The sweep as it stands now. baseline: in place of the sweep's own.

    Raises DataError where there is no sweep, ConfigError where it has no such variant.
    """
    definition = folder.read_definition()
    results = read_results(folder)
    if baseline is not None:
        _compare_with(baseline, results)
    by_arm: dict[str, list[TrialResult]] = {}
    for each in results:
        by_arm.setdefault(each.arm, []).append(each)
    settings = definition["sweep"]
    baseline = next((each.arm for each in results if each.record["baseline"]), None)
    compared_with = by_arm.get(baseline or "", [])
    scored = next((t.documents for t in (*compared_with, *results) if t.documents), None)
    arms = [_arm(name, trials, compared_with, scored) for name, trials in by_arm.items()]
    _rank(arms)
    _adjust(arms, _to_come(results, settings))
    _mark_pareto(arms)
    spent = [arm["flops"] for arm in arms if arm["done"] and arm["flops"]]
    return {
        "format": FORMAT,
        "name": definition["name"],
        "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "budget": settings["budget"],
        "amount": results[0].record["amount"] if results else settings["amount"],
        "seeds": settings["seeds"],
        "baseline": baseline,
        "searcher": settings["searcher"],
        "scheduler": settings["scheduler"],
        "iso_parameters": settings["iso_parameters"],
        "confidence": CONFIDENCE,
        "flops_spread": max(spent) / min(spent) - 1 if spent else None,
        "arms": arms,
        "excluded": [
            {
                "trial": each.name,
                "arm": each.arm,
                "seed": each.seed,
                "status": each.record["status"],
                "why": each.excluded,
            }
            for each in results
            if each.excluded
        ],
        "curves": _curves({arm["name"]: by_arm[arm["name"]] for arm in arms if arm["comparable"]}),
    }


def _compare_with(baseline: str, results: list[TrialResult]) -> None:
    names = list(dict.fromkeys(each.arm for each in results))
    if baseline not in names:
        hint = closest(baseline, names)
        raise ConfigError(
            f"baseline={baseline}: the sweep has no such variant{hint} (it has {', '.join(names)})"
        )
    for each in results:
        each.record["baseline"] = each.arm == baseline


# ------------------------------------------------------------------ one arm


def _arm(
    name: str,
    trials: list[TrialResult],
    baseline: list[TrialResult],
    scored: Documents | None,
) -> dict[str, Any]:
    """scored: the documents that trials must have scored to be compared."""
    done = [each for each in trials if each.nll is not None]
    record = trials[0].record
    comparable = all(_same(each.documents, scored) for each in done)
    difference, untested, documents = None, None, {}
    if not record["baseline"]:
        if comparable and all(_same(t.documents, scored) for t in baseline if t.nll is not None):
            difference, untested = _compared(trials, baseline)
            documents = _over_documents(done, baseline)
        else:
            untested = "other documents"
    steps, per_step = record["steps"], record.get("tokens_per_step")
    tokens = steps * per_step if steps and per_step else None
    speeds = [each.tokens_per_second for each in done if each.tokens_per_second]
    took = [each.seconds.values[-1] for each in done if each.seconds.values.size]
    memory = [each.memory_mib for each in done if each.memory_mib]
    model = next((each.model for each in trials if each.model), {})
    return {
        "name": name,
        "values": record["values"],
        "baseline": record["baseline"],
        "trials": len(trials),
        "done": len(done),
        "steps": steps,
        "tokens": tokens,
        "flops": tokens * record["flops_per_token"] if tokens else None,
        "model": {key: model.get(key) for key in _MODEL} if model else {},
        "nll": _over_seeds({each.seed: each.nll for each in done}),
        "bpb": _over_seeds({each.seed: each.bpb for each in done}),
        "comparable": comparable,
        "difference": difference,
        "untested": untested,
        "documents": documents,
        "tokens_per_second": float(np.mean(speeds)) if speeds else None,
        "seconds": float(np.mean(took)) if took else None,
        "memory_mib": max(memory, default=None),
        "memory_kind": next((each.memory_kind for each in done), None),
        **{key: record.get(key) for key in _COSTS},
    }


def _over_seeds(by_seed: dict[int, float | None]) -> dict[str, Any] | None:
    known = {seed: value for seed, value in by_seed.items() if value is not None}
    if not known:
        return None
    found = dataclasses.asdict(mean_interval(list(known.values())))
    return {**found, "by_seed": {str(seed): value for seed, value in known.items()}}


def _compared(
    trials: list[TrialResult], baseline: list[TrialResult]
) -> tuple[dict[str, Any] | None, str | None]:
    """The difference to the baseline over the seeds that both have, and why it has no p-value."""
    mine, theirs = (
        {each.seed: each.nll for each in arm if each.nll is not None} for arm in (trials, baseline)
    )
    found = paired(mine, theirs)
    if found is None:
        return None, "seeds missing"
    difference = {**dataclasses.asdict(found.difference), "p": found.p, "p_holm": None}
    wanted = {each.seed for each in (*trials, *baseline)}
    if wanted != mine.keys() & theirs.keys():
        return {**difference, "p": None}, "seeds missing"
    if found.p is None:
        few = found.difference.n < FEWEST_FOR_P
        return difference, f"fewer than {FEWEST_FOR_P} seeds" if few else "no spread"
    return difference, None


def _same(documents: Documents | None, others: Documents | None) -> bool:
    """Whether both are known, and have the same sources with as many tokens in each document.

    Other documents, another cut and another tokenizer all show in these.
    """
    if documents is None or others is None or documents.keys() != others.keys():
        return False
    return all(np.array_equal(documents[name][1], others[name][1]) for name in documents)


def _over_documents(done: list[TrialResult], baseline: list[TrialResult]) -> dict[str, Any]:
    """Within each seed that both have; both scored the same documents."""
    theirs = {each.seed: each.documents for each in baseline if each.documents}
    found = {}
    for each in done:
        if each.documents and each.seed in theirs:
            names = sorted(each.documents)
            tokens = np.concatenate([each.documents[name][1] for name in names])
            nll, base = (
                np.concatenate([documents[name][0] for name in names])
                for documents in (each.documents, theirs[each.seed])
            )
            found[str(each.seed)] = dataclasses.asdict(bootstrap_difference(nll, base, tokens))
    return found


# ------------------------------------------------------------------ all arms


def _rank(arms: Sequence[dict[str, Any]]) -> None:
    """By the loss; arms that lack seeds after the others, by their difference within seeds; last
    those whose losses are of other documents."""

    def place(arm: dict[str, Any]) -> tuple[float, ...]:
        loss, difference = arm["nll"]["mean"], arm["difference"]
        if not arm["comparable"]:
            return 2, loss
        if arm["done"] == arm["trials"]:
            return 0, loss
        if arm["baseline"]:
            return 1, 0.0, loss
        return 1, difference["mean"] if difference else math.inf, loss

    order = [arm["name"] for arm in sorted((a for a in arms if a["nll"]), key=place)]
    for arm in arms:
        arm["rank"] = order.index(arm["name"]) + 1 if arm["nll"] else None


def _adjust(arms: Sequence[dict[str, Any]], to_come: int) -> None:
    """Fill in p_holm. The family is what was planned, whatever of it has a p-value by now.

    Else a variant would be judged the more lightly the fewer others have ended, or the more of them
    failed. Those that no run can take are known before there is any result, and are not in it.
    to_come: variants that a search will yet suggest.
    """
    planned = [arm["difference"] for arm in arms if not arm["baseline"] and arm["parameters"]]
    p_values = [difference["p"] if difference else None for difference in planned]
    adjusted = holm([1.0 if p is None else p for p in p_values] + [1.0] * to_come)
    for difference, p, p_holm in zip(planned, p_values, adjusted, strict=False):
        if p is not None:
            difference["p_holm"] = p_holm


def _to_come(results: Sequence[TrialResult], settings: Mapping[str, Any]) -> int:
    """How many suggestions of a search, at the most, are still to be made.

    Each of its studies has begun with draws, so all are known.
    """
    if settings["searcher"] != "optuna":
        return 0
    made = {(s["study"], s["number"]) for each in results for s in each.record["suggestions"]}
    return max(0, len({study for study, _ in made}) * settings["num_samples"] - len(made))


def _mark_pareto(arms: Sequence[dict[str, Any]]) -> None:
    points = {
        arm["name"]: (arm["nll"]["mean"], arm["cache_bytes_per_token"])
        for arm in arms
        if arm["done"] == arm["trials"]
        and arm["comparable"]
        and arm["cache_bytes_per_token"] is not None
    }
    for arm in arms:
        mine = points.get(arm["name"])
        arm["pareto"] = mine is not None and not any(
            other[0] <= mine[0] and other[1] <= mine[1] and other != mine
            for other in points.values()
        )


def _curves(by_arm: dict[str, list[TrialResult]]) -> dict[str, Any]:
    """Of arms that are comparable.

    The validation loss where all were validated often enough, else the training loss.
    """
    done = {arm: [t for t in trials if t.nll is not None] for arm, trials in by_arm.items()}
    done = {arm: trials for arm, trials in done.items() if trials}
    validated = all(
        t.validation.steps.size >= _FEWEST_POINTS for trials in done.values() for t in trials
    )
    what = "validation loss" if validated else "training loss"
    arms = {}
    for arm, trials in done.items():
        columns = [t.validation if validated else t.training for t in trials]
        arms[arm] = _curve(columns, trials)
    return {"what": what, "arms": {arm: curve for arm, curve in arms.items() if curve["step"]}}


def _curve(columns: list[Lines], trials: list[TrialResult]) -> dict[str, list[Any]]:
    """Mean and interval over the trials, which are seeds of an arm, at the steps that all have."""
    steps = columns[0].steps
    for column in columns[1:]:
        steps = np.intersect1d(steps, column.steps)
    values = np.array([c.values[np.isin(c.steps, steps)] for c in columns])  # [seeds, N]
    groups = np.array_split(np.arange(steps.size), min(_MOST_POINTS, max(steps.size, 1)))
    groups = [group for group in groups if group.size]
    points: list[Interval] = [mean_interval(values[:, g].mean(1).tolist()) for g in groups]
    at = np.array([steps[group].mean() for group in groups])
    seconds = np.mean([_at(trial.seconds, at) for trial in trials], axis=0)
    record = trials[0].record
    tokens = at * record["tokens_per_step"]
    return {
        "step": at.tolist(),
        "tokens": tokens.tolist(),
        "flops": (tokens * record["flops_per_token"]).tolist(),
        "seconds": seconds.tolist(),
        "mean": [point.mean for point in points],
        "low": [point.low for point in points],
        "high": [point.high for point in points],
    }


def _at(lines: Lines, steps: np.ndarray) -> np.ndarray:
    if not lines.steps.size:
        return np.zeros(len(steps))
    return np.interp(steps, [0.0, *lines.steps], [0.0, *lines.values])
