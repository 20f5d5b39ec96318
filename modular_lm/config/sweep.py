"""The configuration of a sweep: every key of a training run, which all trials share, and a group
`sweep` that says what varies, what a trial may spend and how trials are compared.

What is listed in `params` and `arms` is expanded in `modular_lm.sweep.space`.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from modular_lm.config.keys import key
from modular_lm.config.load import from_dict, leaf_keys, number_kind, set_key
from modular_lm.config.schema import TrainConfig
from modular_lm.errors import ConfigError

Budget = Literal["tokens", "flops", "steps", "wall"]
StopRule = Literal["none", "asha", "median"]
TimeAxis = Literal["tokens", "flops"]
Searcher = Literal["grid", "random", "optuna"]

DISTRIBUTIONS = ("uniform", "loguniform", "choice")
# What the sweep itself decides for each trial.
_OWN = {
    "name": "trials are named by their values",
    "dump_dir": "each trial has a folder in the sweep's",
    "seed": "list the seeds in sweep.seeds",
    "data.seed": "list the seeds in sweep.seeds",
    "steps": "they follow from sweep.budget and sweep.amount",
    "stop_at": "a trial ends where its budget does",
    "dry_run": "it is the sweep's",
}
# What sweep.iso_parameters sets.
_WIDTHS = ("model.ffn_dim_multiplier", "model.multiple_of")


@dataclass
class SweptConfig:
    """How one key varies: exactly one of the first four."""

    grid: list[Any] | None = key(None, "every one of these values")
    choice: list[Any] | None = key(None, "one of these values, drawn")
    uniform: list[float] | None = key(None, "drawn between two numbers")
    loguniform: list[float] | None = key(None, "drawn between two numbers, its logarithm uniform")
    when: dict[str, list[Any]] = key({}, "key -> values: only where all of these hold")

    @property
    def kind(self) -> str:
        """The name of the field that says how the key varies."""
        return next(kind for kind in ("grid", *DISTRIBUTIONS) if getattr(self, kind) is not None)

    @property
    def values(self) -> list[Any]:
        """The values of grid or choice, the two ends of a range."""
        return getattr(self, self.kind)


@dataclass
class SweepSettings:
    base: str | None = key(
        None, "YAML of a training run whose keys hold where this sweep's file sets none"
    )
    params: dict[str, Any] = key(
        {},
        "key of a training run -> how it varies: {grid: [...]}, {choice: [...]}, "
        "{uniform: [a, b]} or {loguniform: [a, b]}; with `when: {key: [...]}` only where these "
        "hold",
    )
    arms: dict[str, dict[str, Any]] = key(
        {}, "name -> {key: value}: variants by name; each is crossed with params"
    )
    seeds: list[int] = key(
        [0, 1, 2], "each variant is trained with each of these; p-values take at least three"
    )
    baseline: str | None = key(
        None, "the variant that all others are compared with; default: dense, else the first"
    )
    budget: Budget = key(
        "flops",
        "what is the same for all trials; the number of steps follows from it; wall: seconds of "
        "training alone, by a short pilot run of each variant",
    )
    amount: float | None = key(
        None,
        "what a trial may spend: tokens, FLOPs, steps or (required then) seconds; default: what "
        "`steps` cost the baseline",
        gt=0,
    )
    iso_parameters: bool = key(
        False, "set each feed-forward's width so that all variants have the baseline's parameters"
    )
    searcher: Searcher = key(
        "grid",
        "grid: nothing is drawn; random: values may be drawn from ranges; optuna: they are "
        "suggested by what the losses of earlier ones say (pip install 'modular-lm[optuna]')",
    )
    num_samples: int = key(
        8,
        "draws of the values that are drawn; with optuna for each arm and point of the grid",
        ge=1,
    )
    search_seed: int = key(0, "seed of the draws", ge=0)
    scheduler: StopRule = key(
        "none", "stop bad trials early; none for results that are to be published"
    )
    time_axis: TimeAxis = key("flops", "what scheduler compares trials at")
    grace: float = key(0.3, "share of the budget before a trial may be stopped", ge=0.3, le=1)
    max_concurrent: int | None = key(
        None, "trials at a time; default: as many as the cluster has room for", ge=1
    )
    retries: int = key(1, "times that a command tries a failed trial again", ge=0)


@dataclass
class SweepConfig(TrainConfig):
    """Inherits, because every key of a training run is one of a sweep, in the same place."""

    name: str = key("sweep", "name of the sweep")
    dump_dir: str | None = key(None, "folder of the sweep; default: runs/<name>")
    sweep: SweepSettings = key(SweepSettings, "what varies, and how trials are compared")


@dataclass
class ReportConfig:
    dir: str = key("", "the sweep's folder; required")
    baseline: str | None = key(
        None,
        "compare with this variant instead of the sweep's own baseline, in a report of its own in "
        "against/<baseline>",
    )


def swept_keys(sweep: SweepSettings) -> dict[str, SweptConfig]:
    """`params` by the full names of their keys, checked. Raises ConfigError."""
    kinds = {"grid", "when", *DISTRIBUTIONS}
    specs = _flat(sweep.params, lambda name, value: not kinds.isdisjoint(value))
    found = {}
    for name, spec in specs.items():
        path = f"sweep.params.{name}"
        if not isinstance(spec, dict):
            hint = closest(name.rpartition(".")[2], sorted(kinds))
            values = spec if isinstance(spec, list) else [spec]
            raise ConfigError(
                f"{path}={spec}: expected how it varies, e.g. {{grid: {values}}}{hint}"
            )
        if isinstance(when := spec.get("when"), dict):
            spec = {**spec, "when": _flat(when, lambda *_: False)}
        swept = from_dict(SweptConfig, spec, f"{path}.")
        _check_swept(path, swept)
        for value in swept.values:
            check_value(name, value, "sweep.params.")
        _check_kind(path, name, swept, sweep.searcher)
        _check_when(path, swept)
        found[name] = swept
    if sweep.iso_parameters:
        _check_widths(found, "sweep.params")
    if sweep.searcher == "optuna":
        _check_search(sweep, found)
    return found


def named_arms(sweep: SweepSettings) -> dict[str, dict[str, Any]]:
    """`arms` by the full names of their keys, checked. Raises ConfigError."""
    leaves = leaf_keys(TrainConfig)
    found = {}
    for arm, values in sweep.arms.items():
        if not arm or not all(c.isalnum() or c in "._+-" for c in arm) or arm[0] in ".-":
            raise ConfigError(
                f"sweep.arms.{arm}: expected a name that can be a folder's: letters, digits, ._+-"
            )
        found[arm] = _flat(values, lambda name, _: name in leaves)
        for name, value in found[arm].items():
            check_value(name, value, f"sweep.arms.{arm}.")
        if sweep.iso_parameters:
            _check_widths(found[arm], f"sweep.arms.{arm}")
    return found


def check_value(name: str, value: Any, path: str) -> None:
    """Raise ConfigError, the key named with `path` before it, for what no trial would take."""
    if name in _OWN:
        raise ConfigError(f"{path}{name}: cannot be swept: {_OWN[name]}")
    values: dict[str, Any] = {}
    set_key(values, name, value)
    config = from_dict(TrainConfig, values, path)
    # A tokenizer's name stands for its group; any other value would take the place of all keys.
    is_group = any(key.startswith(f"{name}.") for key in leaf_keys(TrainConfig))
    if is_group and not isinstance(value, str):
        raise ConfigError(f"{path}{name}: expected a key, and this is a group; list its keys")
    if config.eval.validation.max_docs == 0:
        raise ConfigError(
            f"{path}eval.validation.max_docs=0: trials are compared by their validation loss; use "
            "more"
        )


def check_sweep(sweep: SweepSettings) -> None:
    """Conditions between the keys of the group. Raises ConfigError."""
    if not sweep.params and not sweep.arms:
        raise ConfigError(
            "sweep.params={}: nothing varies; list keys in sweep.params or variants in sweep.arms"
        )
    if not sweep.seeds or len(set(sweep.seeds)) != len(sweep.seeds) or min(sweep.seeds) < 0:
        raise ConfigError(
            f"sweep.seeds={sweep.seeds}: expected one or more different whole numbers >= 0"
        )
    if sweep.amount is not None and not math.isfinite(sweep.amount):
        raise ConfigError(f"sweep.amount={sweep.amount}: expected a finite number")
    if sweep.budget == "steps" and sweep.amount is not None and not sweep.amount.is_integer():
        raise ConfigError(f"sweep.amount={sweep.amount}: expected a whole number of steps")
    if sweep.budget == "wall" and sweep.amount is None:
        raise ConfigError(
            "sweep.amount: is required with sweep.budget=wall; give the seconds of training of a "
            "trial, without validation and saving"
        )
    if sweep.budget == "wall" and sweep.searcher == "optuna":
        raise ConfigError(
            "sweep.budget=wall: cannot be with sweep.searcher=optuna, each of whose suggestions "
            "would need a pilot of its own; use flops"
        )


def sweep_warnings(sweep: SweepSettings) -> list[str]:
    """What is allowed but probably not meant."""
    found = []
    if len(sweep.seeds) < 3:
        found.append(
            f"sweep.seeds={sweep.seeds}: with fewer than three seeds the report has no p-values"
        )
    if sweep.budget == "wall":
        found.append(
            "sweep.budget=wall: steps follow from pilots that run alone, and hold for this machine "
            "and for what else runs on it then; the fair budget is flops"
        )
    if sweep.scheduler != "none":
        found.append(
            f"sweep.scheduler={sweep.scheduler}: a trial that is stopped early is left out of the "
            "statistics, and modes that learn to read late look worse than they are; use none for "
            "results that are to be published"
        )
    if sweep.searcher == "optuna":
        found.append(
            "sweep.searcher=optuna: the best of many suggestions looks better than it is, and the "
            "report's p-values do not allow for the search; confirm it in a sweep of its own, with "
            "other seeds"
        )
    return found


def closest(name: str, names: list[str]) -> str:
    """ "; did you mean X?", or nothing."""
    found = difflib.get_close_matches(name, names, n=1)
    return f"; did you mean {found[0]}?" if found else ""


def _check_swept(path: str, swept: SweptConfig) -> None:
    given = [kind for kind in ("grid", *DISTRIBUTIONS) if getattr(swept, kind) is not None]
    if len(given) != 1:
        raise ConfigError(
            f"{path}: expected exactly one of grid, {', '.join(DISTRIBUTIONS)}, found "
            f"{' and '.join(given) or 'none'}"
        )
    kind, values = given[0], swept.values
    if not values:
        raise ConfigError(f"{path}.{kind}=[]: expected at least one value")
    if kind.endswith("uniform") and not (
        len(values) == 2 and all(map(math.isfinite, values)) and values[0] < values[1]
    ):
        raise ConfigError(
            f"{path}.{kind}={values}: expected two finite numbers, the smaller one first"
        )
    if kind == "loguniform" and values[0] <= 0:
        raise ConfigError(f"{path}.{kind}={values}: expected numbers > 0")


def _check_kind(path: str, name: str, swept: SweptConfig, searcher: str) -> None:
    if searcher == "grid" and swept.kind != "grid":
        raise ConfigError(
            f"{path}.{swept.kind}: is drawn, and sweep.searcher=grid draws nothing; use grid, or "
            "sweep.searcher=random or optuna"
        )
    if swept.kind.endswith("uniform") and number_kind(TrainConfig, name) is None:
        raise ConfigError(
            f"{path}.{swept.kind}: draws numbers, and the key takes none; use choice, or grid"
        )


def _check_when(path: str, swept: SweptConfig) -> None:
    for name, values in swept.when.items():
        if not values:
            raise ConfigError(f"{path}.when.{name}=[]: expected at least one value")
        for value in values:
            check_value(name, value, f"{path}.when.")


def _check_widths(keys: Iterable[str], path: str) -> None:
    if name := next((key for key in keys if key in _WIDTHS), None):
        raise ConfigError(
            f"{path}.{name}: sweep.iso_parameters sets the feed-forward's width for each variant; "
            f"leave it out here ({name} for all variants decides the baseline's)"
        )


def _check_search(sweep: SweepSettings, swept: dict[str, SweptConfig]) -> None:
    """Conditions on what `searcher: optuna` suggests values of. Raises ConfigError."""
    suggested = {name for name, each in swept.items() if each.kind != "grid"}
    if not suggested:
        raise ConfigError(
            "sweep.searcher=optuna: nothing is drawn; use "
            f"{', '.join(DISTRIBUTIONS)} in sweep.params, or sweep.searcher=grid"
        )
    if sweep.num_samples < 2:
        raise ConfigError(
            f"sweep.num_samples={sweep.num_samples}: expected at least 2 with "
            "sweep.searcher=optuna, for the first are drawn at random"
        )
    for name, each in swept.items():
        above = next((key for key in each.when if key in suggested), None)
        if each.kind == "grid" and above is not None:
            raise ConfigError(
                f"sweep.params.{name}.when: {above} is suggested, and each point of the grid has "
                "suggestions of its own; use choice instead of grid"
            )
        if name in suggested and name.startswith("ray."):
            raise ConfigError(
                f"sweep.params.{name}.{each.kind}: says where a trial runs, not what it learns; "
                "there is nothing to search"
            )


def _flat(values: dict[str, Any], is_leaf: Any, prefix: str = "") -> dict[str, Any]:
    """Nested or dotted keys as dotted ones, down to what `is_leaf(name, value)` calls a value.

    The command line nests (`sweep.params.optim.lr=`), files mostly don't; of a repeated key the
    last holds.
    """
    found: dict[str, Any] = {}
    for part, value in values.items():
        name = f"{prefix}{part}"
        # An empty group stays, to be refused: it would vanish without a word.
        if isinstance(value, dict) and value and not is_leaf(name, value):
            found |= _flat(value, is_leaf, f"{name}.")
        else:
            found[name] = value
    return found
