"""What lies in a sweep's folder, and the state of its trials.

    sweep.yaml                resolved definition: all keys, also those of sweep.base
    trials/<trial>/           an ordinary run folder (`tracking.run_folder`), and in it
        trial.json            what the trial is, and how it stands (below)
    pilots/<arm>/             of sweep.budget=wall: the run folder of what was measured
    report.html report.md     written by `report`, again and again
    report.json pictures/     the same as data, and the report's pictures
    against/<arm>/            reports that compare with another variant than the sweep does
    events.jsonl ray/         signals that asked it to stop; Ray Tune's files, lock, stop request

`trial.json` holds

    name, arm, seed           of the trial; arm: the name of its variant
    order                     the arm's place in the definition, from 0
    removed                   whether the definition has its arm or seed no more: it is kept, and
                              not of the sweep while that is so
    values                    {full key: value} as swept; keys: with what iso_parameters adds
    budget, amount            what the trial may spend; steps: what follows from it
    seconds_per_step          of sweep.budget=wall, what its pilot took; null, as steps, before it
    baseline                  whether the others are compared with its arm
    tokens_per_step, flops_per_token, parameters, ffn_dim, cache_bytes_per_token
                              its cost (`budget.Cost`), null where it cannot run
    given                     the configuration, as a training job is given it
    suggestions               [{study, number, values}] of a search: those that it is the trial of
    status                    pending | running | done | stopped | failed
    why                       of stopped and failed, and of one that was interrupted: the reason
    attempts                  how often it was started, failures: how often it failed

It is written by the sweep's driver only, as a whole, so that readers find the old or the new one.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import yaml

from modular_lm.config.checks import flatten
from modular_lm.config.load import from_dict, to_dict, to_yaml
from modular_lm.config.schema import TrainConfig
from modular_lm.config.sweep import SweepConfig
from modular_lm.errors import ConfigError, DataError
from modular_lm.files import write_text_atomic
from modular_lm.sweep.trials import Plan, Trial, merge
from modular_lm.tracking.run_folder import RunFolder

Status = Literal["pending", "running", "done", "stopped", "failed"]
STATUSES: tuple[str, ...] = get_args(Status)

_DESCRIPTION = ("name", "arm", "seed", "values", "keys", "steps", "given")
_STATE = ("status", "why", "attempts", "failures")
# Keys and groups of a run that say only where and how it is run. Of those that make up a step, its
# tokens are compared.
_ANYWHERE = (
    *("dump_dir", "hang_timeout_s", "logging", "ray", "data.loader", "data.allow_change"),
    *("checkpoint.dump", "checkpoint.eval", "checkpoint.rolling", "checkpoint.path"),
    *("checkpoint.async_save", "eval.validation.batch_size"),
    *("data.batch_size", "grad_acc_steps"),
)
_STEP = "tokens per step (data.batch_size, grad_acc_steps, ray.num_workers)"
# What else is read of every trial, of one that was trained, and of the definition.
_READ = ("amount", "baseline")
_READ_OF_TRAINED = ("tokens_per_step", "flops_per_token")
_READ_OF_DEFINITION = (
    "budget",
    "amount",
    "seeds",
    "baseline",
    "searcher",
    "scheduler",
    "iso_parameters",
)


class SweepFolder:
    """Names of everything in a sweep's folder (`dump_dir`), and the state of its trials."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser().absolute()

    @property
    def definition(self) -> Path:
        return self.path / "sweep.yaml"

    @property
    def pictures(self) -> Path:
        return self.path / "pictures"

    def report(self, kind: Literal["html", "md", "json"]) -> Path:
        """The report's page, its table, its data."""
        return self.path / f"report.{kind}"

    def against(self, baseline: str) -> SweepFolder:
        """Where the report is that compares with another variant than the sweep does."""
        return SweepFolder(self.path / "against" / baseline)

    def run(self, trial: str) -> RunFolder:
        """The run folder of a trial."""
        return RunFolder(self.path / "trials" / trial)

    def pilot(self, arm: str) -> RunFolder:
        """The run folder of a variant's pilot."""
        return RunFolder(self.path / "pilots" / arm)

    def trial_file(self, trial: str) -> Path:
        return self.run(trial).path / "trial.json"

    def begin(self, plan: Plan, config: SweepConfig) -> None:
        """Write the definition, and a `trial.json` for each trial that has none.

        Trials that are there keep their state: the same sweep again goes on, and one with further
        variants or seeds adds them. Those whose variant or seed it has no more are marked so.
        Raises ConfigError, before anything is written, as `check` does.
        """
        records, known = self.check(plan)
        self.path.mkdir(parents=True, exist_ok=True)
        for name, old in known.items():
            if name not in records:
                self.write({**old, "removed": True, "baseline": False})
        write_text_atomic(self.definition, to_yaml(resolved(plan, config)))
        for name, record in records.items():
            old = known.get(name, record)
            self.write({**record, **{key: old[key] for key in _STATE}})

    def check(self, plan: Plan) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, Any]]]:
        """What `trial.json` files the plan asks for and which are there, by the trials' names.

        Raises ConfigError where a trial of the same name was something else.
        """
        records = {trial.name: describe(plan, trial) for trial in plan.trials}
        known = {record["name"]: record for record in self.records()}
        for name, record in records.items():
            if name in known:
                _check_same(self.path, known[name], record)
        return records, known

    def update(self, trial: str, status: Status, why: str | None = None) -> None:
        """Record how a trial stands: `running` counts an attempt, `failed` a failure."""
        record = self.read(trial)
        if record is None:
            raise ValueError(f"{self.trial_file(trial)}: no such trial")
        counts = {
            "attempts": record["attempts"] + (status == "running"),
            "failures": record["failures"] + (status == "failed"),
        }
        self.write({**record, "status": status, "why": why, **counts})

    def measured(self, arm: str, seconds: float) -> None:
        """Record what a step of a variant takes."""
        for record in self.records():
            if record["arm"] == arm:
                self.write({**record, "seconds_per_step": seconds})

    def read(self, trial: str) -> dict[str, Any] | None:
        """The `trial.json` of a trial, None without one. Raises DataError for an unreadable one."""
        file = self.trial_file(trial)
        try:
            record = json.loads(file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise DataError(f"{file}: expected JSON: {error}; remove the trial's folder") from error
        if (wrong := _missing(record)) is not None:
            raise DataError(
                f"{file}: expected a trial's state, and {wrong} is not; remove the trial's folder"
            )
        return record

    def write(self, record: Mapping[str, Any]) -> None:
        """Replace the `trial.json` that `record` is to be."""
        file = self.trial_file(record["name"])
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text_atomic(file, json.dumps(record, indent=1, ensure_ascii=False) + "\n")

    def records(self) -> list[dict[str, Any]]:
        """Every `trial.json` that is there, also of arms and seeds that were taken out."""
        folders = sorted(self.path.glob("trials/*/trial.json"))
        records = [record for file in folders if (record := self.read(file.parent.name))]
        return sorted(records, key=lambda r: (r.get("order", 0), r["arm"], r["seed"]))

    def trials(self) -> list[dict[str, Any]]:
        """Those of the definition: by arm in its order, then by seed."""
        return [record for record in self.records() if not record.get("removed")]

    def read_definition(self) -> dict[str, Any]:
        """Raises DataError where no sweep is."""
        try:
            definition = yaml.safe_load(self.definition.read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            raise DataError(
                f"dir={self.path}: expected the folder of a sweep, with sweep.yaml in it"
            ) from None
        except yaml.YAMLError as error:
            raise DataError(f"{self.definition}: not a readable YAML file: {error}") from error
        if not isinstance(definition, dict) or not isinstance(definition.get("sweep"), dict):
            raise DataError(f"{self.definition}: expected the keys of a sweep, and a group `sweep`")
        wanted = [
            ("name", definition),
            *((key, definition["sweep"]) for key in _READ_OF_DEFINITION),
        ]
        if missing := [key for key, values in wanted if key not in values]:
            raise DataError(
                f"{self.definition}: lacks {', '.join(missing)}; start the sweep again, which "
                "writes it anew"
            )
        return definition


def resolved(plan: Plan, config: SweepConfig) -> dict[str, Any]:
    """All keys of a sweep's definition, which needs no other file and no default any more."""
    values = merge(to_dict(config), plan.base)
    sweep = {"base": None, "baseline": plan.baseline, "amount": plan.amount}
    return {**values, "dump_dir": str(plan.folder), "sweep": {**values["sweep"], **sweep}}


def describe(plan: Plan, trial: Trial) -> dict[str, Any]:
    """The `trial.json` of a trial that has not begun, or never can."""
    arm = trial.arm
    names = [each.name for each in plan.arms]
    cost = dataclasses.asdict(arm.cost) if arm.cost else {}
    return {
        "name": trial.name,
        "arm": arm.name,
        "order": names.index(arm.name),
        "removed": False,
        "seed": trial.seed,
        "values": arm.values,
        "keys": arm.keys,
        "budget": plan.settings.budget,
        "amount": plan.amount,
        "steps": arm.steps,
        "seconds_per_step": arm.seconds_per_step,
        "baseline": arm.name == plan.baseline,
        **cost,
        "given": trial.given,
        "suggestions": [dataclasses.asdict(each) for each in arm.suggestions],
        "status": "failed" if arm.why else "pending",
        "why": arm.why,
        "attempts": 0,
        "failures": 0,
    }


def _missing(record: Any) -> str | None:
    """What a `trial.json` lacks, None if nothing."""
    if not isinstance(record, dict):
        return "a mapping"
    needed = [*_DESCRIPTION, *_STATE, *_READ]
    if record.get("status") in ("done", "stopped"):
        needed += _READ_OF_TRAINED
    if missing := [key for key in needed if key not in record]:
        return ", ".join(missing)
    return None if record["status"] in STATUSES else "its status"


def _check_same(folder: Path, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    try:
        before, after = _identity(old), _identity(new)
    except ConfigError as error:
        raise ConfigError(
            f"dump_dir={folder}: its trial {old['name']} is of another version: {error}; use "
            "another dump_dir (or name)"
        ) from error
    # What could not run, or was not measured, had no steps, and may have some now.
    changed = [
        key
        for key in {**before, **after}
        if before.get(key) != after.get(key)
        and not (key in ("steps", _STEP) and before[key] is None)
    ]
    if changed:
        key = changed[0]
        what = f"{key}: {before.get(key, 'not set')} -> {after.get(key, 'not set')}"
        if key == "steps" and old.get("budget") != new["budget"]:
            what += f" (it had sweep.budget={old.get('budget')})"
        elif key == "steps" and old["amount"] != new["amount"]:
            what += f" (sweep.amount={old['amount']!r} gives those that it had)"
        if new["why"] and not old["why"]:
            what = f"it cannot be trained any more: {new['why']}"
        raise ConfigError(
            f"dump_dir={folder}: its trial {old['name']} was begun otherwise: {what}; a sweep can "
            "get further variants and seeds, but what it has cannot change: use another dump_dir "
            "(or name)"
        )


def _identity(record: Mapping[str, Any]) -> dict[str, Any]:
    """What makes two trials of a name the same one: full key -> value, defaults written out."""
    # By way of JSON: what is written, and what it is read back as, are the same.
    given = json.loads(json.dumps(record["given"]))
    keys = flatten(to_dict(from_dict(TrainConfig, given)))
    fixed = {
        key: value
        for key, value in keys.items()
        if not any(key == each or key.startswith(f"{each}.") for each in _ANYWHERE)
    }
    return {**fixed, "steps": record["steps"], _STEP: record.get("tokens_per_step")}
