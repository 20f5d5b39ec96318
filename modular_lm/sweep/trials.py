"""The trials of a sweep: each variant with each seed, with its configuration, cost and steps.

Trials with the same seed are paired: they see the same samples in the same order, and their trunks
begin with the same weights (both follow from the seed and from names, not from the variant), for as
many steps as both have. A variant that no run can take (an odd head, say) is kept, with the reason,
so that it fails alone.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from modular_lm.config.checks import dump_dir_of, resolve, world_sizes
from modular_lm.config.load import (
    from_dict,
    leaf_keys,
    load_config,
    set_key,
    to_dict,
    to_yaml,
)
from modular_lm.config.schema import TokenizerConfig, TokenizerName, TrainConfig
from modular_lm.config.sweep import (
    SweepConfig,
    SweepSettings,
    check_sweep,
    closest,
    sweep_warnings,
)
from modular_lm.errors import ConfigError
from modular_lm.sweep.budget import (
    Cost,
    check_spread,
    cost_of,
    match_parameters,
    steps_within,
    unit_per_step,
)
from modular_lm.sweep.space import Suggestion, Variant, acts_nowhere, studies_of, variants_of
from modular_lm.sweep.tpe import check_installed
from modular_lm.tokenizer import build_tokenizer

_BASELINE = "dense"


@dataclass(frozen=True)
class Arm:
    """A variant and what it takes.

    keys: all that distinguishes its runs from the base's, `values` and what iso_parameters adds
    config: resolved, with the base's seed and steps; None where it cannot run: `why` says so
    steps: None without config, and before a pilot (`pilots`)
    seconds_per_step: as a pilot took, of a budget of seconds
    suggestions: of a search, those that it is the trial of
    """

    name: str
    values: dict[str, Any]
    keys: dict[str, Any]
    config: TrainConfig | None
    steps: int | None = None
    seconds_per_step: float | None = None
    why: str | None = None
    suggestions: tuple[Suggestion, ...] = ()

    @property
    def cost(self) -> Cost | None:
        return None if self.config is None else cost_of(self.config)


@dataclass(frozen=True)
class Trial:
    """One training run. given: what a training job would be given, with name, folder, steps."""

    name: str
    arm: Arm
    seed: int
    given: dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """A sweep before it starts. amount: what each trial may spend, in units of the budget.

    base: the values that the trials share, nested; arms are in the definition's order
    unsuggested: of a search, how many suggestions wait for results of others
    warnings: what is allowed but probably not meant
    """

    settings: SweepSettings
    folder: Path
    base: dict[str, Any]
    baseline: str
    amount: float
    arms: list[Arm]
    unsuggested: int = 0
    warnings: tuple[str, ...] = ()

    @property
    def trials(self) -> list[Trial]:
        """Seed by seed, so that every variant has its first result early."""
        return [self.trial(arm, seed) for seed in self.settings.seeds for arm in self.arms]

    @property
    def first_of_baseline(self) -> Trial:
        """What would fail every trial shows in it."""
        baseline = next(arm for arm in self.arms if arm.name == self.baseline)
        return self.trial(baseline, self.settings.seeds[0])

    def trial(self, arm: Arm, seed: int) -> Trial:
        """The run of an arm with a seed."""
        name = f"{arm.name}__seed-{seed}"
        given = copy.deepcopy(self.base)
        own = {"name": name, "dump_dir": str(self.folder / "trials" / name), "seed": seed}
        if arm.steps is not None:
            own["steps"] = arm.steps
        if place := (given.get("checkpoint") or {}).get("path"):
            own["checkpoint.path"] = f"{place.rstrip('/')}/{name}"
        for key, value in {**arm.keys, **own}.items():
            set_key(given, key, copy.deepcopy(value))
        return Trial(name, arm, seed, given)


def plan_sweep(config: SweepConfig, given: Mapping[str, Any]) -> Plan:
    """Expand and check a sweep; writes nothing. Raises ConfigError.

    given: as `load_config` returns it. Of a search, the plan holds what depends on no results
    (`search.grown` adds the rest).
    """
    settings = config.sweep
    check_sweep(settings)
    if settings.searcher == "optuna":
        check_installed()
    base = base_values(config, given)
    if from_dict(TrainConfig, base).eval.validation.max_docs == 0:
        raise ConfigError(
            "eval.validation.max_docs=0: trials are compared by their validation loss; use more"
        )
    variants = variants_of(settings, base)
    baseline = _baseline(settings, variants)
    arms = [_arm(base, each) for each in variants]
    first = next(arm for arm in arms if arm.name == baseline)
    if first.cost is None:
        raise ConfigError(f"sweep.baseline={baseline}: cannot be trained: {first.why}")
    if settings.iso_parameters:
        arms = [_matched(base, arm, first) for arm in arms]
    arms = _distinct(arms, settings, baseline)
    made = [suggestion for each in variants for suggestion in each.suggestions]
    left = suggestions_in_all(settings, base) - len(made)
    if len(arms) == 1 and not left:
        raise ConfigError(
            f"sweep: {baseline} is the only variant, so there is nothing to compare: give "
            "sweep.params more values (and a `when` that holds), or sweep.arms more names"
        )
    _check_measurable(settings, arms)
    amount = settings.amount or _default_amount(settings, base, first.cost)
    arms = [_with_steps(arm, settings, amount) for arm in arms]
    if settings.budget in ("tokens", "flops"):
        spent = {
            arm.name: arm.steps * unit_per_step(settings.budget, arm.cost)
            for arm in arms
            if arm.steps and arm.cost
        }
        check_spread(spent, settings.budget, amount)
    folder = Path(dump_dir_of(config)).expanduser().absolute()
    warnings = sweep_warnings(settings) + [
        f"sweep.params.{name}.when: holds in no variant, so the key does not vary: {why}"
        for name, why in acts_nowhere(settings, base, variants).items()
    ]
    return Plan(settings, folder, base, baseline, amount, arms, left, tuple(warnings))


def _check_measurable(settings: SweepSettings, arms: Sequence[Arm]) -> None:
    """Seconds of a step are those of a number of workers. Raises ConfigError."""
    for arm in arms if settings.budget == "wall" else ():
        fewest, most = world_sizes(arm.config.ray) if arm.config else (1, 1)
        if fewest != most:
            raise ConfigError(
                f"sweep.budget=wall: cannot be with ray.num_workers=[{fewest},{most}], for a step "
                "of more workers takes less time; use one number, or flops"
            )


def suggestions_in_all(settings: SweepSettings, base: Mapping[str, Any]) -> int:
    """How many suggestions a search makes; 0 without a search."""
    if settings.searcher != "optuna":
        return 0
    searched = [study for study in studies_of(settings, base) if study.is_searched]
    return len(searched) * settings.num_samples


def with_variants(plan: Plan, variants: Sequence[Variant], known: Collection[str]) -> Plan:
    """The plan of a search with these variants in place of its own.

    known: names of arms that have trials: of variants that train the same, one of them stays. Here
    also a variant fails alone that whole steps bring too far from the baseline.
    """
    first = next(arm for arm in plan.arms if arm.name == plan.baseline)
    arms = [_arm(plan.base, each) for each in variants]
    if plan.settings.iso_parameters:
        arms = [_matched(plan.base, arm, first) for arm in arms]
    arms = _distinct(arms, plan.settings, plan.baseline, known)
    arms = [_fair(_with_steps(arm, plan.settings, plan.amount), first, plan) for arm in arms]
    suggested = sum(len(each.suggestions) for each in variants)
    left = suggestions_in_all(plan.settings, plan.base) - suggested
    return replace(plan, arms=arms, unsuggested=left)


def _fair(arm: Arm, baseline: Arm, plan: Plan) -> Arm:
    budget = plan.settings.budget
    if budget == "steps":
        return arm
    spent = {
        each.name: each.steps * unit_per_step(budget, each.cost)
        for each in (baseline, arm)
        if each.steps and each.cost
    }
    try:
        check_spread(spent, budget, plan.amount)
    except ConfigError as error:
        return replace(arm, config=None, steps=None, why=str(error))
    return arm


def base_values(config: SweepConfig, given: Mapping[str, Any]) -> dict[str, Any]:
    """What the trials share: the file of `sweep.base`, then what the sweep itself is given."""
    values: dict[str, Any] = {}
    if config.sweep.base is not None:
        try:
            values = load_config(TrainConfig, [f"config={config.sweep.base}"])[1]
        except ConfigError as error:
            raise ConfigError(f"sweep.base: {error}") from error
    values = merge(values, {k: v for k, v in given.items() if k != "sweep"})
    for key in ("name", "dump_dir", "dry_run", "stop_at"):
        values.pop(key, None)
    return values


def _baseline(settings: SweepSettings, variants: list[Variant]) -> str:
    names = [each.name for each in variants]
    if settings.baseline is None:
        return _BASELINE if _BASELINE in names else names[0]
    if settings.baseline not in names:
        shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
        hint = closest(settings.baseline, names)
        raise ConfigError(
            f"sweep.baseline={settings.baseline}: no variant has this name{hint} (they are {shown})"
        )
    return settings.baseline


def _arm(base: Mapping[str, Any], each: Variant) -> Arm:
    made = Arm(each.name, each.values, each.values, None, suggestions=each.suggestions)
    try:
        config = _config(base, each.values)
        resolved = resolve(config, _n_words(config))
        cost_of(resolved)  # asks for the mesh, too
    except ConfigError as error:
        return replace(made, why=str(error))
    return replace(made, config=resolved)


def _matched(base: Mapping[str, Any], arm: Arm, baseline: Arm) -> Arm:
    """With the keys that give it the baseline's parameters."""
    if arm.config is None or baseline.cost is None:
        return arm
    config = _config(base, arm.values)
    wanted, n_words = baseline.cost.parameters, _n_words(config)
    try:
        keys = {**arm.values, **match_parameters(config, wanted, n_words)}
        return replace(arm, keys=keys, config=resolve(_config(base, keys), n_words))
    except ConfigError as error:
        return replace(arm, config=None, why=str(error))


def _with_steps(arm: Arm, settings: SweepSettings, amount: float) -> Arm:
    if arm.cost is None or settings.budget == "wall":
        return arm
    return replace(arm, steps=steps_within(amount, unit_per_step(settings.budget, arm.cost)))


def _default_amount(settings: SweepSettings, base: Mapping[str, Any], cost: Cost) -> float:
    return from_dict(TrainConfig, dict(base)).steps * unit_per_step(settings.budget, cost)


def _distinct(
    arms: list[Arm], settings: SweepSettings, baseline: str, known: Collection[str] = ()
) -> list[Arm]:
    """Without those that train the same by another name, e.g. module_agg mean and avg.

    Raises ConfigError where it is the names that were asked for.
    """
    first: dict[str, Arm] = {}
    # Of two that are the same the baseline stays, else one that has trials.
    for arm in sorted(arms, key=lambda arm: (arm.name != baseline, arm.name not in known)):
        same = to_yaml(to_dict(arm.config)) if arm.config else arm.name
        if same in first and not settings.params:
            raise ConfigError(
                f"sweep.arms.{arm.name}: trains the same as sweep.arms.{first[same].name}"
            )
        kept = first.setdefault(same, arm)
        if kept is not arm:
            first[same] = replace(kept, suggestions=(*kept.suggestions, *arm.suggestions))
    kept = {arm.name: arm for arm in first.values()}
    return [kept[arm.name] for arm in arms if arm.name in kept]


def _config(base: Mapping[str, Any], keys: Mapping[str, Any]) -> TrainConfig:
    values = copy.deepcopy(dict(base))
    for key, value in keys.items():
        set_key(values, key, copy.deepcopy(value))
    return from_dict(TrainConfig, values)


def _n_words(config: TrainConfig) -> int:
    return _words(config.data.tokenizer.name, config.data.tokenizer.path)


@functools.lru_cache
def _words(name: TokenizerName, path: str | None) -> int:
    return build_tokenizer(TokenizerConfig(name, path)).n_words


def merge(values: Mapping[str, Any], over: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`values` with what `over` sets: groups are merged key by key, values replaced."""
    merged = dict(values)
    for name, value in over.items():
        full, old = f"{prefix}{name}", values.get(name)
        is_group = isinstance(value, Mapping) and full not in leaf_keys(TrainConfig)
        if is_group and isinstance(old, Mapping):
            merged[name] = merge(old, value, f"{full}.")
        else:
            merged[name] = copy.deepcopy(value)
    return merged
