"""The variants of a sweep: a pure function of its definition, with names that stay the same.

A variant ("arm") is one choice of values for the swept keys. Grids are crossed; what is drawn is
drawn once for each of `num_samples`, from a generator per key, so that every point of the grid gets
the same draws, and another key more or less changes none.
"""

from __future__ import annotations

import hashlib
import math
import random
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from modular_lm.config.checks import flatten
from modular_lm.config.load import from_dict, to_dict
from modular_lm.config.schema import TrainConfig
from modular_lm.config.sweep import SweepSettings, SweptConfig, named_arms, swept_keys
from modular_lm.errors import ConfigError

_LONGEST_NAME = 120


@dataclass(frozen=True)
class Variant:
    """name: that of a folder, too; values: full key -> value, as swept."""

    name: str
    values: dict[str, Any]


def variants_of(sweep: SweepSettings, base: Mapping[str, Any]) -> list[Variant]:
    """All variants in the order of the definition, no two with the same values.

    base: the values of a training run that the variants share, nested. Raises ConfigError.
    """
    swept = _in_order(swept_keys(sweep))
    defaults = flatten(to_dict(from_dict(TrainConfig, dict(base))))
    drawn = any(each.kind != "grid" for each in swept.values())
    found: dict[str, Variant] = {}
    for arm, fixed in (named_arms(sweep) or {"": {}}).items():
        for number in range(sweep.num_samples if drawn else 1):
            for values in _combinations(swept, {**defaults, **fixed}, sweep.search_seed, number):
                each = _variant(arm, fixed, values, list(swept))
                if each.values == found.get(each.name, each).values:
                    found[each.name] = each
                else:  # two texts that make the same name
                    found[_with_digest(each.name, repr(each.values))] = each
    return [Variant(name, each.values) for name, each in found.items()]


def _variant(
    arm: str, fixed: Mapping[str, Any], values: Mapping[str, Any], swept: list[str]
) -> Variant:
    """The variant of a named arm (or none, "") with its `fixed` values and those of `params`.

    swept: all keys of `params`, whether they act here or not: they decide how names are shortened.
    """
    clash = next((key for key in values if key in fixed), None)
    if clash is not None:
        raise ConfigError(f"sweep.params.{clash}: sweep.arms.{arm} sets it already")
    short = _short_names(swept)
    parts = [arm] if arm else []
    parts += [f"{short[key]}-{_text(value)}" for key, value in values.items()]
    name = "__".join(parts) or "base"
    if len(name) > _LONGEST_NAME:
        name = _with_digest(name, name)
    return Variant(name, {**fixed, **values})


def _with_digest(name: str, text: str) -> str:
    digest = hashlib.sha256(text.encode()).hexdigest()[:8]
    return f"{name[: _LONGEST_NAME - 9]}-{digest}"


def _acts(swept: SweptConfig, current: Mapping[str, Any]) -> bool:
    """Whether the `when` of a key holds. current: full key -> value."""
    return all(current.get(key) in values for key, values in swept.when.items())


def _in_order(swept: dict[str, SweptConfig]) -> dict[str, SweptConfig]:
    """Each key after those that its `when` asks for, else as listed. Raises ConfigError."""
    ordered: dict[str, SweptConfig] = {}
    waiting = dict(swept)
    while waiting:
        ready = next(
            (name for name, each in waiting.items() if waiting.keys().isdisjoint(each.when)), None
        )
        if ready is None:
            name = next(iter(waiting))
            raise ConfigError(
                f"sweep.params.{name}.when: goes in a circle, by way of {', '.join(waiting)}"
            )
        ordered[ready] = waiting.pop(ready)
    return ordered


def _combinations(
    swept: Mapping[str, SweptConfig], current: Mapping[str, Any], seed: int, number: int
) -> Iterator[dict[str, Any]]:
    if not swept:
        yield {}
        return
    (key, first), *others = swept.items()
    rest = dict(others)
    if not _acts(first, current):
        yield from _combinations(rest, current, seed, number)
        return
    values = first.values if first.kind == "grid" else [_draw(key, first, seed, number)]
    for value in values:
        for more in _combinations(rest, {**current, key: value}, seed, number):
            yield {key: value, **more}


def _draw(key: str, swept: SweptConfig, seed: int, number: int) -> Any:
    # A generator per key and draw, from a text: the same in every version of Python.
    generator = random.Random(f"{seed}/{key}/{number}")
    if swept.kind == "choice":
        return generator.choice(swept.values)
    low, high = swept.values
    if swept.kind == "uniform":
        value = generator.uniform(low, high)
    else:
        value = math.exp(generator.uniform(math.log(low), math.log(high)))
    # As it stands in names; more digits would only pretend a precision.
    return min(max(float(f"{value:.4g}"), low), high)


def _short_names(keys: list[str]) -> dict[str, str]:
    """The last part of each key where no other ends the same, else the whole key."""
    last = [key.rsplit(".", 1)[-1] for key in keys]
    return {key: end if last.count(end) == 1 else key for key, end in zip(keys, last, strict=True)}


def _text(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    text = f"{value:g}" if isinstance(value, float) and float(f"{value:g}") == value else str(value)
    return re.sub(r"[^A-Za-z0-9.+-]+", "-", text).strip(".") or "empty"
