"""What the trials' run folders hold, read as they are: also from trials that run or failed."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import yaml

from modular_lm.sweep.folder import SweepFolder
from modular_lm.tracking.run_folder import RunFolder, metric_values

Floats = npt.NDArray[np.float64]
Documents = dict[str, tuple[Floats, Floats]]
"""source -> (summed nll [D], tokens [D])"""

_NLL = re.compile(r"validation/(.+)/nll")
# What a memory figure is, by the names in metrics lines; the first that is there counts.
_MEMORY = {"memory/max_allocated": "device", "memory/rss": "process"}


@dataclass(frozen=True)
class Lines:
    """A column of a metrics file: steps [N] and values [N], in order of the steps."""

    steps: Floats
    values: Floats


@dataclass(frozen=True)
class TrialResult:
    """A trial and what it measured.

    record: its trial.json; model: the resolved keys of `model` and data.seq_len, {} if it never
    began; validation, training: nats per token; seconds: of training, without validation and
    saving, summed over attempts
    nll, bpb, documents: after its last step, None while it is not done
    excluded: why it is not in the statistics
    """

    record: dict[str, Any]
    model: dict[str, Any]
    validation: Lines
    training: Lines
    seconds: Lines
    nll: float | None
    bpb: float | None
    documents: Documents | None
    tokens_per_second: float | None
    memory_mib: float | None
    memory_kind: str | None
    excluded: str | None

    @property
    def name(self) -> str:
        return self.record["name"]

    @property
    def arm(self) -> str:
        return self.record["arm"]

    @property
    def seed(self) -> int:
        return self.record["seed"]


def read_results(folder: SweepFolder) -> list[TrialResult]:
    """All trials of a sweep, in the order of its definition. Raises DataError."""
    return [read_trial(folder.run(record["name"]), record) for record in folder.trials()]


def read_trial(run: RunFolder, record: dict[str, Any]) -> TrialResult:
    """One trial from its run folder."""
    training = _by_step(run.metrics)
    evaluations = _by_step(run.eval_metrics)
    source = _source(evaluations)
    validation = _column(evaluations, f"validation/{source}/nll")
    nll, bpb, excluded = _final(record, evaluations, source)
    wps = _column(training, "speed/wps").values
    memory = next((name for name in _MEMORY if _column(training, name).values.size), None)
    return TrialResult(
        record=record,
        model=_model(run.config),
        validation=validation,
        training=_column(training, "loss/out"),
        seconds=_seconds(training),
        nll=nll,
        bpb=bpb,
        documents=None if nll is None else _documents(run.documents_file(record["steps"])),
        # The first line's interval holds the start of everything.
        tokens_per_second=float(np.median(wps[1:])) if wps.size > 1 else None,
        memory_mib=float(_column(training, memory).values.max()) if memory else None,
        memory_kind=_MEMORY[memory] if memory else None,
        excluded=excluded,
    )


def _final(
    record: Mapping[str, Any], evaluations: dict[int, dict[str, float]], source: str
) -> tuple[float | None, float | None, str | None]:
    """Loss and bits per byte after the last step, or why there are none."""
    status = record["status"]
    if status != "done":
        return None, None, f"{status}: {record['why']}" if record["why"] else status
    last = evaluations.get(record["steps"], {})
    nll = last.get(f"validation/{source}/nll")
    if nll is None:
        return None, None, f"no validation loss after its last step, {record['steps']}"
    if not math.isfinite(nll):
        return None, None, f"diverged: its validation loss is {nll}"
    return nll, last.get(f"validation/{source}/bpb"), None


def validation_loss(line: Mapping[str, Any]) -> float | None:
    """The loss that trials are compared by in a line of `metrics.eval.jsonl`, None without one."""
    values = metric_values(line)
    return values.get(f"validation/{_source({0: values})}/nll")


def _by_step(lines: Any) -> dict[int, dict[str, float]]:
    """The numbers of each step; of two lines for a step the later holds."""
    found = {line["global_step"]: metric_values(line) for line in lines if "global_step" in line}
    return dict(sorted(found.items()))


def _source(evaluations: dict[int, dict[str, float]]) -> str:
    """`all` where there are several sources, else the only one."""
    names = {m[1] for line in evaluations.values() for key in line if (m := _NLL.fullmatch(key))}
    return "all" if "all" in names or not names else min(names)


def _column(lines: dict[int, dict[str, float]], name: str) -> Lines:
    """A name's finite values."""
    found = [
        (s, line[name]) for s, line in lines.items() if math.isfinite(line.get(name, math.nan))
    ]
    columns = np.array(found, dtype=np.float64).reshape(-1, 2)
    return Lines(columns[:, 0], columns[:, 1])


def _seconds(training: dict[int, dict[str, float]]) -> Lines:
    each = _column(training, "speed/curr_iter_time")
    spans = np.diff(each.steps, prepend=0.0)
    return Lines(each.steps, np.cumsum(spans * each.values))


def _model(config: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(config.read_text(encoding="utf-8"))
        return {**values["model"], "seq_len": values["data"]["seq_len"]}
    except (OSError, yaml.YAMLError, KeyError, TypeError):
        return {}


def _documents(file: Path) -> Documents | None:
    """None where they were not written, or a loss is not finite."""
    try:
        sources = json.loads(file.read_text(encoding="utf-8"))["sources"]
        return {
            name: (np.array(each["nll"], np.float64), np.array(each["tokens"], np.float64))
            for name, each in sources.items()
            if None not in each["nll"]
        }
    except (OSError, ValueError, KeyError):
        return None
