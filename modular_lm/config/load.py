"""YAML + `key=value` into a typed dataclass tree, and back.

Precedence: dataclass defaults < YAML < command line; of a repeated key the last wins. Every
mistake (unknown key, wrong type, value out of bounds) is a `ConfigError` of one line with the full
key path. OmegaConf parses YAML and resolves its interpolations; types, bounds and the "did you
mean" are ours, so that each message says what was expected.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import functools
import operator
import types
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from modular_lm.config.lingua import translate_lingua
from modular_lm.config.schema import TokenizerConfig, TrainConfig
from modular_lm.errors import ConfigError

T = TypeVar("T")
_NULLS = ("null", "none", "~")
_BOUNDS = {
    "ge": (">=", operator.ge),
    "gt": (">", operator.gt),
    "le": ("<=", operator.le),
    "lt": ("<", operator.lt),
}


def load_config(cls: type[T], args: Sequence[str]) -> tuple[T, dict[str, Any]]:
    """Build `cls` from `config=FILE` and `key=value` arguments.

    Returns the config and the values as given (YAML merged with the command line), which is what
    `base_config.yaml` records. Raises ConfigError.
    """
    path, overrides = _split_args(args)
    given: dict[str, Any] = {}
    if path is not None:
        given = _load_yaml(path)
    for dotted, raw in overrides:
        set_key(given, dotted, _parse_value(cls, dotted, raw))
    if issubclass(cls, TrainConfig):
        translate_lingua(given)
    return _build(cls, given, ""), given


def from_dict(cls: type[T], values: dict[str, Any], path: str = "") -> T:
    """Build `cls` from a plain nested dict, with the same checks. Raises ConfigError.

    path: what stands before its keys in messages, e.g. "data.".
    """
    if not isinstance(values, dict):
        where = f"{path.rstrip('.')}: " if path else ""
        raise ConfigError(f"{where}expected a mapping of keys, found a {type(values).__name__}")
    return _build(cls, values, path)


def to_dict(config: Any) -> dict[str, Any]:
    """The config as a plain nested dict of YAML types, by the names that users write."""
    values = {}
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        is_group = dataclasses.is_dataclass(value)
        values[_key_of(f)] = to_dict(value) if is_group else copy.deepcopy(value)
    return values


def to_yaml(values: dict[str, Any]) -> str:
    """A nested dict as YAML, in the order of the keys."""
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def format_help(cls: type, what: str, usage: str) -> str:
    """The text of `--help`: what the job does, then every key with type, default and meaning."""
    rows = [
        (f"{path}={_show(default)}", _type_name(hint), meta["help"])
        for path, hint, default, meta in _leaves(cls, "")
    ]
    width = min(max(len(r[0]) for r in rows), 44)
    kinds = min(max(len(r[1]) for r in rows), 34)
    lines = [what, "", f"usage: {usage}", "", "keys, with their defaults:"]
    lines += [f"  {name:<{width}}  {kind:<{kinds}}  {text}" for name, kind, text in rows]
    return "\n".join(lines)


# ------------------------------------------------------------------ arguments and YAML


def _split_args(args: Sequence[str]) -> tuple[str | None, list[tuple[str, str]]]:
    path, overrides = None, []
    for arg in args:
        name, equals, value = arg.partition("=")
        if not equals or not name:
            raise ConfigError(
                f"argument {arg!r}: expected key=value, e.g. config=configs/debug.yaml"
            )
        if name == "config":
            path = value
        else:
            overrides.append((name.lstrip("-"), value))
    return path, overrides


def _load_yaml(path: str) -> dict[str, Any]:
    if Path(path).is_dir():
        raise ConfigError(f"config={path}: is a folder; expected a YAML file")
    if not Path(path).is_file():
        raise ConfigError(f"config={path}: no such file")
    try:
        values = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise ConfigError(f"config={path}: not a readable YAML file: {_one_line(error)}") from error
    if not isinstance(values, dict):
        raise ConfigError(
            f"config={path}: expected a mapping of keys, found a {type(values).__name__}"
        )
    return values  # type: ignore[return-value]


def _parse_value(cls: type, dotted: str, raw: str) -> Any:
    """A command-line value; text for keys of type str, so that a prompt may hold ': ' or '['."""
    hint = _hint_of(cls, dotted)
    if hint is not None and _is_text(hint):
        return None if _optional(hint) and raw.lower() in _NULLS else raw
    try:
        value = OmegaConf.from_dotlist([f"value={raw}"])["value"]
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"{dotted}={raw}: not a readable value: {_one_line(error)}") from error
    return OmegaConf.to_container(value) if OmegaConf.is_config(value) else value


def set_key(values: dict[str, Any], dotted: str, value: Any) -> None:
    """Set `a.b.c` in a nested dict, making the groups that are missing. Raises ConfigError."""
    *parents, leaf = dotted.split(".")
    for i, parent in enumerate(parents):
        # YAML reads the step in `stages: {8000: ...}` as a number.
        key = next((k for k in values if str(k) == parent), parent)
        child = values.setdefault(key, {})
        if child is None:
            child = values[key] = {}
        if not isinstance(child, dict):
            raise ConfigError(
                f"{dotted}: {'.'.join(parents[: i + 1])} is a value, not a group of keys"
            )
        values = child
    values[leaf] = value


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


# ------------------------------------------------------------------ building


def _build(cls: type[T], values: dict[str, Any], path: str) -> T:
    fields = {_key_of(f): f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    hints = get_type_hints(cls)
    built: dict[str, Any] = {}
    for name, value in values.items():
        full = f"{path}{name}"
        if name not in fields:
            raise ConfigError(_unknown(cls, path, str(name)))
        attribute = fields[name].name
        hint = hints[attribute]
        if dataclasses.is_dataclass(hint):
            if value is None:
                continue
            if isinstance(value, str) and hint is TokenizerConfig:
                value = {"name": value}
            if not isinstance(value, dict):
                names = ", ".join(_key_of(f) for f in dataclasses.fields(hint))
                raise ConfigError(f"{full}={value!r}: expected a group of keys ({names})")
            built[attribute] = _build(hint, value, f"{full}.")  # type: ignore[type-var]
        else:
            built[attribute] = _convert(hint, value, full)
            _check_bounds(built[attribute], fields[name].metadata, full)
    return cls(**built)


def _unknown(cls: type, path: str, name: str) -> str:
    siblings = [_key_of(f) for f in dataclasses.fields(cls)]
    close = difflib.get_close_matches(name, siblings, n=1, cutoff=0.6)
    if close:
        return f"unknown key {path}{name}: did you mean {path}{close[0]}?"
    elsewhere = [p for p, *_ in _leaves(cls, path) if p.rsplit(".", 1)[-1] == name]
    if elsewhere:
        return f"unknown key {path}{name}: did you mean {elsewhere[0]}?"
    where = f"under {path[:-1]}" if path else "at the top level"
    return f"unknown key {path}{name}: the keys {where} are {', '.join(siblings)}"


def _convert(hint: Any, value: Any, full: str) -> Any:
    if hint is Any:
        return value
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        kinds = [a for a in args if a is not type(None)]
        # `int | list[int]`: a list, or text with commas, is one, all else is the other.
        many = isinstance(value, list) or (isinstance(value, str) and "," in value)
        fits = (a for a in kinds if (get_origin(a) is list) == many)
        return _convert(next(fits, kinds[0]), value, full)
    if origin is Literal:
        if value in args:
            return value
        close = difflib.get_close_matches(str(value), [str(a) for a in args], n=1)
        hint_text = f"; did you mean {close[0]}?" if close else ""
        choices = ", ".join(map(str, args))
        raise ConfigError(f"{full}={value}: expected one of {choices}{hint_text}")
    if origin is list and isinstance(value, str):
        value = [part.strip() for part in value.split(",") if part.strip()]
    if origin is list and isinstance(value, list):
        return [_convert(args[0], v, full) for v in value]
    if origin is dict and isinstance(value, dict):
        if args[1] is float:
            value = _dotted(value)
        return {str(k): _convert(args[1], v, f"{full}.{k}") for k, v in value.items()}
    if hint is bool and isinstance(value, bool):
        return value
    if hint is str and isinstance(value, str | int | float) and not isinstance(value, bool):
        return str(value)
    if hint is int and (number := _integer(value)) is not None:
        return number
    if hint is float and (real := _real(value)) is not None:
        return real
    raise ConfigError(f"{full}={value!r}: expected {_type_name(hint)}")


def _dotted(values: dict[Any, Any]) -> dict[str, Any]:
    """Names with dots, which the command line takes for groups, put together again."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        inner = _dotted(value) if isinstance(value, dict) else {"": value}
        found |= {f"{name}.{rest}" if rest else str(name): v for rest, v in inner.items()}
    return found


def _integer(value: Any) -> int | None:
    """An int, also from 1e9 or "64"; None if the value is not a whole number."""
    real = _real(value)
    if real is None or not real.is_integer():
        return None
    return value if isinstance(value, int) else int(real)


def _real(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        return float(value)
    except ValueError:
        return None


def _check_bounds(value: Any, metadata: Any, full: str) -> None:
    if isinstance(value, list):
        for i, item in enumerate(value):
            _check_bounds(item, metadata, f"{full}.{i}")
    if not isinstance(value, int | float) or isinstance(value, bool):
        return
    if value != value:
        raise ConfigError(f"{full}={value}: expected a number")
    limits = [(b, metadata[b]) for b in _BOUNDS if metadata.get(b) is not None]
    if not all(_BOUNDS[bound][1](value, limit) for bound, limit in limits):
        wanted = " and ".join(f"{_BOUNDS[bound][0]} {limit:g}" for bound, limit in limits)
        raise ConfigError(f"{full}={value}: expected a number {wanted}")


# ------------------------------------------------------------------ looking at the tree


@functools.cache
def leaf_keys(cls: type) -> frozenset[str]:
    """The full keys of all values, as opposed to groups, below `cls`."""
    return frozenset(path for path, *_ in _leaves(cls, ""))


@functools.cache
def number_kind(cls: type, dotted: str) -> type[int] | type[float] | None:
    """Which kind of number a key takes, also a name in a mapping; None: it takes none."""
    for path, hint, *_ in _leaves(cls, ""):
        if dotted == path or dotted.startswith(f"{path}."):
            while get_origin(hint) is dict:
                hint = get_args(hint)[1]
            kinds = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
            return next((kind for kind in (int, float) if kind in kinds), None)
    return None


def _leaves(cls: type, path: str) -> Iterable[tuple[str, Any, Any, Any]]:
    """(full key, type, default, metadata) of every leaf below `cls`."""
    hints = get_type_hints(cls)
    for f in dataclasses.fields(cls):
        hint = hints[f.name]
        if dataclasses.is_dataclass(hint):
            yield from _leaves(hint, f"{path}{_key_of(f)}.")  # type: ignore[arg-type]
        else:
            factory = f.default_factory
            default = f.default if factory is dataclasses.MISSING else factory()
            yield f"{path}{_key_of(f)}", hint, default, f.metadata


def _key_of(f: dataclasses.Field[Any]) -> str:
    """The name under which users write a field."""
    return f.metadata.get("name") or f.name


def _hint_of(cls: type, dotted: str) -> Any:
    return next((hint for path, hint, *_ in _leaves(cls, "") if path == dotted), None)


def _optional(hint: Any) -> bool:
    return get_origin(hint) in (Union, types.UnionType) and type(None) in get_args(hint)


def _is_text(hint: Any) -> bool:
    return hint is str or (_optional(hint) and str in get_args(hint))


def _type_name(hint: Any) -> str:
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " | ".join(_type_name(a) for a in args)
    if origin is Literal:
        return "|".join(map(str, args))
    if origin is dict:
        return f"{{name: {_type_name(args[1])}}}"
    if origin is list:
        return f"[{_type_name(args[0])}, ...]"
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    names[Any] = "value"
    return "null" if hint is type(None) else names.get(hint, str(hint))


def _show(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{', '.join(map(_show, value))}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k}: {_show(v)}" for k, v in value.items()) + "}"
    return str(value)
