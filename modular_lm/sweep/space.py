"""The variants of a sweep: a pure function of its definition, with names that stay the same.

A variant ("arm") is one choice of values for the swept keys. Grids are crossed; what is drawn is
drawn once for each of `num_samples`, from a generator per key, so that every point of the grid gets
the same draws, and another key more or less changes none.

With `searcher: optuna` only the first of them are drawn like this; each named arm and point of the
grid is a study, and `search` says what follows from the results of a study.
"""

from __future__ import annotations

import functools
import hashlib
import math
import random
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from modular_lm.config.checks import flatten
from modular_lm.config.load import from_dict, number_kind, to_dict
from modular_lm.config.schema import TrainConfig
from modular_lm.config.sweep import SweepSettings, SweptConfig, named_arms, swept_keys
from modular_lm.errors import ConfigError

_LONGEST_NAME = 120


# With `searcher: optuna`: so many are drawn before the first is suggested (Optuna's own default),
# but never more than half of them.
_MOST_AT_RANDOM = 10

Draw = Callable[[str, SweptConfig], Any]
"""(full key, how it varies) -> the value of a key that is drawn."""


@dataclass(frozen=True)
class Suggestion:
    """What made a variant in a search. number: within its study; values: of the drawn keys."""

    study: str
    number: int
    values: dict[str, Any]


@dataclass(frozen=True)
class Variant:
    """name: that of a folder, too; values: full key -> value, as swept.

    suggestions: of a search, those that made it, of any study
    """

    name: str
    values: dict[str, Any]
    suggestions: tuple[Suggestion, ...] = ()


@dataclass(frozen=True)
class Study:
    """What is searched together: a named arm (or none, "") at a point of the grid.

    fixed: the arm's values; swept: all keys in order, of each grid the point's value alone
    current: the values of the keys that are not swept
    """

    name: str
    arm: str
    fixed: Mapping[str, Any]
    swept: Mapping[str, SweptConfig]
    current: Mapping[str, Any]

    @property
    def is_searched(self) -> bool:
        """Whether a key is drawn here: no condition of the first one depends on what is drawn."""
        acting = next(_combinations(self.swept, self.current, lambda key, swept: None))
        return any(self.swept[key].kind != "grid" for key in acting)

    def variant(self, number: int, draw: Draw) -> Variant:
        """That of a suggestion, without one where no key is drawn."""
        (values,) = _combinations(self.swept, self.current, draw)
        made = _variant(self.arm, self.fixed, values, list(self.swept))
        drawn = {key: value for key, value in values.items() if self.swept[key].kind != "grid"}
        suggestions = (Suggestion(self.name, number, drawn),) if drawn else ()
        return replace(made, suggestions=suggestions)


def variants_of(sweep: SweepSettings, base: Mapping[str, Any]) -> list[Variant]:
    """All variants in the order of the definition, no two with the same values.

    base: the values of a training run that the variants share, nested. Of a search, those that do
    not depend on results. Raises ConfigError.
    """
    if sweep.searcher == "optuna":
        first = range(drawn_at_random(sweep))
        return distinct(
            study.variant(number, at_random(sweep, number))
            for study in studies_of(sweep, base)
            for number in first
        )
    swept = _in_order(swept_keys(sweep))
    drawn = any(each.kind != "grid" for each in swept.values())
    return distinct(
        _variant(arm, fixed, values, list(swept))
        for arm, fixed, current in _arms(sweep, base)
        for number in range(sweep.num_samples if drawn else 1)
        for values in _combinations(swept, current, at_random(sweep, number))
    )


def studies_of(sweep: SweepSettings, base: Mapping[str, Any]) -> list[Study]:
    """The studies of a search, in the order of the definition. Raises ConfigError."""
    swept = _in_order(swept_keys(sweep))
    grids = {key: each for key, each in swept.items() if each.kind == "grid"}
    found: dict[str, Study] = {}
    for arm, fixed, current in _arms(sweep, base):
        for point in _combinations(grids, current, at_random(sweep, 0)):
            name = _variant(arm, fixed, point, list(swept)).name
            here = {
                key: replace(each, grid=[point[key]]) if key in point else each
                for key, each in swept.items()
            }
            if name in found and found[name].swept != here:
                name = _with_digest(name, repr(point))
            found[name] = Study(name, arm, fixed, here, current)
    return list(found.values())


def drawn_at_random(sweep: SweepSettings) -> int:
    """How many suggestions of a study are drawn as `searcher: random` draws them."""
    return min(_MOST_AT_RANDOM, (sweep.num_samples + 1) // 2)


def at_random(sweep: SweepSettings, number: int) -> Draw:
    """Draws that depend on `search_seed`, the key and the number alone."""
    return functools.partial(_draw, sweep.search_seed, number)


def distinct(variants: Iterable[Variant]) -> list[Variant]:
    """Each once, with all suggestions that made it, by names that differ."""
    found: dict[str, Variant] = {}
    for each in variants:
        if each.values != found.get(each.name, each).values:  # two texts that make the same name
            each = replace(each, name=_with_digest(each.name, repr(each.values)))
        known = found.get(each.name)
        if known is not None:
            each = replace(known, suggestions=(*known.suggestions, *each.suggestions))
        found[each.name] = each
    return list(found.values())


def acts_nowhere(
    sweep: SweepSettings, base: Mapping[str, Any], variants: Iterable[Variant]
) -> dict[str, str]:
    """Swept keys that none of the variants sets -> why; a typo in a `when` drops an axis so.

    Not of a search's keys that depend on what is suggested: later suggestions may set them.
    """
    swept = swept_keys(sweep)
    suggested = {key for key, each in swept.items() if each.kind != "grid"}
    used = {key for each in variants for key in each.values}
    arms = [current for _, _, current in _arms(sweep, base)]
    found = {}
    for name, each in swept.items():
        if name in used or (sweep.searcher == "optuna" and not suggested.isdisjoint(each.when)):
            continue
        conditions = []
        for key, wanted in each.when.items():
            there = [current.get(key) for current in arms]
            there += swept[key].values if key in swept else []
            is_, asked = (", ".join(dict.fromkeys(map(_text, v))) for v in (there, wanted))
            conditions.append(f"{key} is {is_}, and {asked} is asked for")
        found[name] = "; ".join(conditions)
    return found


def is_whole(key: str) -> bool:
    """Whether a key takes whole numbers only."""
    return number_kind(TrainConfig, key) is int


def rounded(key: str, value: float, swept: SweptConfig) -> float:
    """A number of a range as it stands in names; more digits would only pretend a precision."""
    low, high = swept.values
    value = min(max(float(f"{value:.4g}"), low), high)
    return round(value) if is_whole(key) else value


def _arms(
    sweep: SweepSettings, base: Mapping[str, Any]
) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """(name, its values, all values) of each named arm, else of one without a name."""
    defaults = flatten(to_dict(from_dict(TrainConfig, dict(base))))
    for arm, fixed in (named_arms(sweep) or {"": {}}).items():
        yield arm, fixed, {**defaults, **fixed}


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
    swept: Mapping[str, SweptConfig], current: Mapping[str, Any], draw: Draw
) -> Iterator[dict[str, Any]]:
    if not swept:
        yield {}
        return
    (key, first), *others = swept.items()
    rest = dict(others)
    if not _acts(first, current):
        yield from _combinations(rest, current, draw)
        return
    values = first.values if first.kind == "grid" else [draw(key, first)]
    for value in values:
        for more in _combinations(rest, {**current, key: value}, draw):
            yield {key: value, **more}


def _draw(seed: int, number: int, key: str, swept: SweptConfig) -> Any:
    # A generator per key and draw, from a text: the same in every version of Python.
    generator = random.Random(f"{seed}/{key}/{number}")
    if swept.kind == "choice":
        return generator.choice(swept.values)
    low, high = swept.values
    if is_whole(key):  # half a number more at both ends, so that these are as likely as others
        low, high = low - 0.5, high + 0.5
    if swept.kind == "uniform":
        value = generator.uniform(low, high)
    else:
        value = math.exp(generator.uniform(math.log(low), math.log(high)))
    return rounded(key, value, swept)


def _short_names(keys: list[str]) -> dict[str, str]:
    """The last part of each key where no other ends the same, else the whole key."""
    last = [key.rsplit(".", 1)[-1] for key in keys]
    return {key: end if last.count(end) == 1 else key for key, end in zip(keys, last, strict=True)}


def _text(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    text = f"{value:g}" if isinstance(value, float) and float(f"{value:g}") == value else str(value)
    return re.sub(r"[^A-Za-z0-9.+-]+", "-", text).strip(".") or "empty"
