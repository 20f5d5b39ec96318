"""The tables of a sweep's report as text, for the page and for Markdown alike."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

LEVEL = 0.05
UNITS = {"tokens": "tokens", "flops": "FLOPs", "steps": "steps", "wall": "seconds of training"}


@dataclass(frozen=True)
class Table:
    """rows: cells as plain text, the first of each is the row's name."""

    header: tuple[str, ...]
    rows: list[tuple[str, ...]]


def arms_table(summary: Mapping[str, Any]) -> Table:
    """All arms that have results, the best first."""
    arms = sorted((arm for arm in summary["arms"] if arm["nll"]), key=lambda arm: arm["rank"])
    header = (
        "variant",
        "loss (nats per token)",
        "difference",
        "p (Holm)",
        "verdict",
        "bits per byte",
        "seeds",
        "steps",
        "tokens/s",
        "FLOPs per token",
        "parameters",
        "cache, bytes per token",
        "memory, MiB",
    )
    return Table(header, [_arm_row(arm) for arm in arms])


def _arm_row(arm: Mapping[str, Any]) -> tuple[str, ...]:
    difference = arm["difference"]
    p = difference and difference["p_holm"]
    n_done = f"{arm['done']}" + ("" if arm["done"] == arm["trials"] else f" of {arm['trials']}")
    return (
        arm["name"],
        interval(arm["nll"], "{:.4f}"),
        "baseline" if arm["baseline"] else interval(difference, "{:+.4f}"),
        "" if arm["baseline"] else p_value(p),
        verdict(arm),
        interval(arm["bpb"], "{:.4f}"),
        n_done,
        f"{arm['steps']:,}",
        number(arm["tokens_per_second"], "{:,.0f}"),
        number(arm["flops_per_token"], "{:.4g}"),
        number(arm["parameters"], "{:,}"),
        number(arm["cache_bytes_per_token"], "{:,.1f}"),
        number(arm["memory_mib"], "{:,.0f}"),
    )


def documents_table(summary: Mapping[str, Any]) -> Table | None:
    """Differences to the baseline within each seed, over validation documents."""
    rows = [
        (arm["name"], seed, f"{found['n']:,}", interval(found, "{:+.4f}"))
        for arm in summary["arms"]
        for seed, found in arm["documents"].items()
    ]
    header = ("variant", "seed", "documents", "difference (nats per token)")
    return Table(header, rows) if rows else None


def values_table(summary: Mapping[str, Any]) -> Table:
    """What each arm sets."""
    keys = list(dict.fromkeys(key for arm in summary["arms"] for key in arm["values"]))
    width = ("feed-forward width",) if summary["iso_parameters"] else ()
    rows = [
        (
            arm["name"],
            *(_value(arm["values"], key) for key in keys),
            *(number(arm["ffn_dim"], "{:,}") for _ in width),
        )
        for arm in summary["arms"]
    ]
    return Table(("variant", *keys, *width), rows)


def excluded_table(summary: Mapping[str, Any]) -> Table | None:
    """The trials that are in no statistics, and why."""
    rows = [(each["trial"], str(each["why"])) for each in summary["excluded"]]
    return Table(("trial", "why"), rows) if rows else None


def headline(summary: Mapping[str, Any]) -> str:
    """What was compared, in two sentences."""
    arms, seeds = summary["arms"], summary["seeds"]
    lost = sum(each["status"] == "done" for each in summary["excluded"])
    done = sum(arm["done"] for arm in arms) + lost
    total = sum(arm["trials"] for arm in arms)
    unit = UNITS[summary["budget"]]
    text = (
        f"{done} of {total} trials are done{f' ({lost} without a loss)' if lost else ''}: "
        f"{len(arms)} variants, seeds {', '.join(map(str, seeds))}. "
        f"Each may spend {amount(summary['amount'])} {unit}"
    )
    took = [arm["seconds"] for arm in arms if arm["seconds"] is not None]
    if summary["budget"] == "wall" and took:
        text += f", by pilots; the variants took {min(took):,.4g} to {max(took):,.4g}"
    if summary["flops_spread"] is not None:
        text += f"; in FLOPs the trials that are done differ by {summary['flops_spread']:.2%}"
    if summary["iso_parameters"]:
        text += "; feed-forward widths are set so that all have the baseline's parameters"
    return text + "."


def how_to_read(summary: Mapping[str, Any]) -> list[str]:
    """What the figures in the table mean, a sentence or two each."""
    lines = [
        "Loss: of held-out documents after a trial's last step, the mean over seeds. In brackets "
        "the 95 % confidence interval (Student's t over seeds); one seed has none.",
        "Difference: to the baseline with the same seed, so with the same data in the same order "
        "and the same initial trunk. p: paired t-test over at least three seeds, corrected by "
        f"Holm for all variants. A verdict is given below {LEVEL}; otherwise none is possible, "
        "which does not show that there is no difference. The intervals are not corrected: each "
        "holds for its variant alone, and may leave out 0 where the verdict is open.",
        "FLOPs per token: of training, by formula. Cache: what decoding holds for a sequence of "
        "full length, per token of it.",
        "Tokens/s and memory are measured, and hold for the machine and for what else ran on it. "
        "Memory: the highest figure in the metrics lines, " + _memory(summary) + ".",
    ]
    if summary["budget"] == "wall":
        lines.append(
            "Seconds: the steps of a variant are the budget over what a step took in a pilot that "
            "ran alone. What trials took is more by their first steps and by what ran beside them."
        )
    if summary["searcher"] == "optuna":
        lines.append(
            "Variants were suggested by what the losses of others said: the best of them looks "
            "better than it is, and p-values do not allow for that. Other seeds would show."
        )
    if any(arm["untested"] == "other documents" for arm in summary["arms"]):
        lines.append(
            "Other documents: it was scored on other documents than the baseline, on the same cut "
            "elsewhere (data.seq_len), as other tokens, or evals/<step>/documents.json is missing: "
            "nats per token of these cannot be compared. It stands last and is in no picture."
        )
    if summary["excluded"]:
        causes = Counter(each["why"].partition(":")[0] for each in summary["excluded"])
        lines.append(
            f"Without a result: {', '.join(f'{n} {cause}' for cause, n in causes.items())}. A "
            "variant that lacks seeds, or whose baseline does, has a difference over those that "
            "both have, but no verdict: the seeds that are left may favour it. It stands below "
            "those that have all, and its marks in the pictures are hollow."
        )
    return lines


def _memory(summary: Mapping[str, Any]) -> str:
    """What the figures of memory are."""
    if any(arm["memory_kind"] == "process" for arm in summary["arms"]):
        return "of rank 0's whole process at the moments when lines were written, so no peak"
    return "of a GPU PyTorch's peak since the line before"


def verdict(arm: Mapping[str, Any]) -> str:
    """better, worse, or open; where no test is possible, why."""
    difference = arm["difference"]
    if arm["baseline"] or arm["untested"]:
        return arm["untested"] or ""
    if difference["p_holm"] >= LEVEL:
        return "open"
    return "better" if difference["mean"] < 0 else "worse"


def interval(found: Mapping[str, Any] | None, form: str) -> str:
    """`mean [low, high]`."""
    if not found:
        return ""
    mean = form.format(found["mean"])
    if found["low"] is None:
        return mean
    return f"{mean} [{form.format(found['low'])}, {form.format(found['high'])}]"


def p_value(p: float | None) -> str:
    if p is None:
        return ""
    return f"{p:.3f}" if p >= 0.001 else f"{p:.0e}"


def amount(value: float | None) -> str:
    """A budget: whole where people write it so, else by its power of ten."""
    return number(value, "{:,.10g}" if (value or 0) < 1e9 else "{:.4g}")


def number(value: float | None, form: str) -> str:
    """Formatted, empty where there is none."""
    return "" if value is None else form.format(value)


def markdown(table: Table) -> str:
    """A table in Markdown; the first column is text, the others numbers."""
    lines = [_line(table.header), _line(["---", *["---:"] * (len(table.header) - 1)])]
    return "\n".join(lines + [_line(row) for row in table.rows])


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(" ".join(c.split()).replace("|", "\\|") for c in cells) + " |"


def _value(values: Mapping[str, Any], key: str) -> str:
    if key not in values:
        return "as the base"
    value = values[key]
    return json.dumps(value) if value is None or isinstance(value, bool) else str(value)
