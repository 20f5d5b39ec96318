"""Site profiles: what a cluster wants to be told, so that a user need not know.

A profile is a YAML file in `cluster/sites` (or any path): the fields of `Site`, and under `kinds`
those of `Kind` for each kind of node. What the user gives always wins; docs/slurm.md says how to
add a site.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from cluster.options import (
    IF_ASKED,
    LaunchConfig,
    check_sbatch_options,
    check_word,
    duration_s,
    option_name,
    unknown,
)
from modular_lm.config.load import from_dict
from modular_lm.errors import ConfigError, reason

FOLDER = Path(__file__).parent / "sites"
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


@dataclass
class Kind:
    """One kind of node: what asking for it takes, and what it has.

    account_suffix: what the account must end with; charged: whether an account is needed, which the
    site's account_variable then names; module_load: before the user's;
    qos: name -> longest time; longest: the longest time where there are no such names.
    """

    constraint: str | None = None
    partition: str | None = None
    account_suffix: str | None = None
    charged: bool = True
    gpus_per_node: int = 0
    cpus_per_gpu: int | None = None
    cpus_per_node: int | None = None
    module_load: list[str] = field(default_factory=list)
    qos: dict[str, str] = field(default_factory=dict)
    longest: str | None = None


@dataclass
class Site:
    """A cluster.

    account_variable: environment variable of the login node that names the account to charge;
    module_purge: begin with no modules; environment: variables of the job, in whose values $NAME is
    replaced on the node, as in temp_root: a short folder on each node's own disk; port_range: ports
    [first, end) of which every job takes a block; start_timeout_s: seconds that nodes may take to
    come, and then Ray.
    """

    description: str = ""
    account_variable: str | None = None
    sbatch_options: list[str] = field(default_factory=list)
    module_purge: bool = False
    environment: dict[str, str] = field(default_factory=dict)
    temp_root: str = "/tmp"
    port_range: list[int] = field(default_factory=lambda: [20000, 32000])
    start_timeout_s: int = 600
    kinds: dict[str, Kind] = field(default_factory=dict)


@dataclass(frozen=True)
class NodeSetup:
    """What a job does on a node before anything of the user's: see `Site` and `Kind`."""

    modules: tuple[str, ...] = ()
    module_purge: bool = False
    environment: Mapping[str, str] = field(default_factory=dict)
    temp_root: str = "/tmp"
    port_range: tuple[int, int] = (20000, 32000)
    start_timeout_s: int = 600


def load_site(name: str) -> Site:
    """The profile of that name, or in that file. Raises ConfigError."""
    file = Path(name).expanduser() if "/" in name or name.endswith(".yaml") else _known(name)
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"site={name}: {reason(error)}") from error
    try:
        return _read(values)
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from None


def apply_site(
    c: LaunchConfig, site: Site, environment: Mapping[str, str]
) -> tuple[LaunchConfig, NodeSetup]:
    """The options with what the site adds to them; `environment` is the login node's.

    Raises ConfigError for a kind, a qos or a time that the site does not have.
    """
    c = dataclasses.replace(c, kind=_name_of_kind(c, site))
    kind = site.kinds[c.kind] if c.kind is not None else Kind()
    gpus = kind.gpus_per_node if c.gpus_per_node is None else c.gpus_per_node
    cpus = c.cpus_per_node or kind.cpus_per_node
    if cpus is None and gpus and kind.cpus_per_gpu:
        cpus = gpus * kind.cpus_per_gpu
    if kind.gpus_per_node and gpus > kind.gpus_per_node:
        raise ConfigError(f"gpus_per_node={gpus}: nodes of kind={c.kind} have {kind.gpus_per_node}")
    _check_time(c, kind)
    setup = NodeSetup(
        modules=tuple(kind.module_load),
        module_purge=site.module_purge,
        environment=site.environment,
        temp_root=site.temp_root,
        port_range=(site.port_range[0], site.port_range[1]),
        start_timeout_s=site.start_timeout_s,
    )
    options = dataclasses.replace(
        c,
        gpus_per_node=gpus,
        cpus_per_node=cpus,
        account=_account(c, site, kind, environment),
        partition=c.partition or kind.partition,
        constraint=c.constraint or kind.constraint,
        sbatch_options=[*_not_overridden(site.sbatch_options, c), *c.sbatch_options],
    )
    return options, setup


def _known(name: str) -> Path:
    names = sorted(file.stem for file in FOLDER.glob("*.yaml"))
    if name not in names:
        raise unknown("site", name, names)
    return FOLDER / f"{name}.yaml"


def _read(values: Any) -> Site:
    kinds = values.pop("kinds", None) or {} if isinstance(values, dict) else {}
    site = from_dict(Site, values)
    if not isinstance(kinds, dict):
        raise ConfigError("kinds: expected a mapping of names to kinds of nodes")
    for name, described in kinds.items():
        try:
            _check_durations(described)
            site.kinds[str(name)] = from_dict(Kind, described)
        except ConfigError as error:
            raise ConfigError(f"kinds.{name}: {error}") from None
    for name in site.environment:
        if not _VARIABLE.fullmatch(name):
            raise ConfigError(f"environment.{name}: not a name of a variable")
    check_sbatch_options(site.sbatch_options, of_site=True)
    if not (len(site.port_range) == 2 and 1024 <= site.port_range[0] < site.port_range[1] <= 65536):
        raise ConfigError(f"port_range={site.port_range}: expected [first, end] in 1024 to 65536")
    if not site.temp_root.startswith(("/", "$")):
        raise ConfigError(
            f"temp_root={site.temp_root}: expected an absolute path, or one that begins with a "
            "variable of the nodes, e.g. $TMPDIR"
        )
    if site.start_timeout_s < 1:
        raise ConfigError(f"start_timeout_s={site.start_timeout_s}: expected seconds, 1 or more")
    for name, kind in site.kinds.items():
        for word in ("partition", "constraint", "account_suffix"):
            check_word(f"kinds.{name}.{word}", getattr(kind, word))
        for qos, longest in [*kind.qos.items(), ("longest", kind.longest)]:
            if longest is not None:
                duration_s(longest, f"kinds.{name}.{qos}")
    return site


def _check_durations(described: Any) -> None:
    """Raise ConfigError for durations of a kind that YAML has made numbers of."""
    values = described if isinstance(described, dict) else {}
    qos = values.get("qos")
    named = {f"qos.{name}": value for name, value in qos.items()} if isinstance(qos, dict) else {}
    for name, value in {**named, "longest": values.get("longest")}.items():
        if isinstance(value, int | float):
            raise ConfigError(
                f'{name}={value}: put it in quotes, e.g. "20:00:00", which without them YAML '
                "takes for a number"
            )


def _name_of_kind(c: LaunchConfig, site: Site) -> str | None:
    """The kind that is asked for, or the only one; None at a site without kinds."""
    if c.kind is not None and c.kind not in site.kinds:
        raise unknown("kind", c.kind, list(site.kinds))
    if c.kind is None and len(site.kinds) > 1:
        raise ConfigError(f"site={c.site} has several kinds of nodes: kind={'|'.join(site.kinds)}")
    return c.kind or next(iter(site.kinds), None)


def _account(c: LaunchConfig, site: Site, kind: Kind, environment: Mapping[str, str]) -> str | None:
    account = c.account
    if account is None and site.account_variable and kind.charged:
        account = environment.get(site.account_variable) or None
    if account is None or kind.account_suffix is None or account.endswith(kind.account_suffix):
        return account
    mark = kind.account_suffix[0]
    if mark in account:
        raise ConfigError(
            f"account={account}: kind={c.kind} is charged to an account that ends with "
            f"{kind.account_suffix}, e.g. {account.split(mark)[0]}{kind.account_suffix}"
        )
    return account + kind.account_suffix


def _check_time(c: LaunchConfig, kind: Kind) -> None:
    if c.qos is not None and kind.qos and c.qos not in kind.qos:
        raise unknown("qos", c.qos, list(kind.qos))
    if c.time is None:
        return
    longest = kind.longest
    if kind.qos:
        # Without a name SLURM takes the first, its default.
        longest = kind.qos[c.qos or next(iter(kind.qos))]
    if longest is None or duration_s(c.time) <= duration_s(longest):
        return
    enough = [q for q, t in kind.qos.items() if duration_s(c.time) <= duration_s(t)]
    under = f"qos={c.qos}" if c.qos else f"kind={c.kind}, without qos,"
    advice = f"use qos={enough[0]}" if enough else f"use at most {_longest_of(kind)}"
    raise ConfigError(f"time={c.time}: {under} allows {longest}; {advice}")


def _longest_of(kind: Kind) -> str | None:
    return max(kind.qos.values(), key=duration_s) if kind.qos else kind.longest


def _not_overridden(options: list[str], c: LaunchConfig) -> list[str]:
    own = {option_name(option) for option in c.sbatch_options}
    own |= {name for name in IF_ASKED if getattr(c, name) is not None}
    return [option for option in options if option_name(option) not in own]
