"""The pictures of a sweep, drawn from its summary (`summary.summarise`) and from nothing else.

Matplotlib, which MLflow brings along, is imported where it is used, and without `pyplot`, which
would keep every figure in a state of the whole process.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from modular_lm.sweep.statistics import FEWEST_FOR_P
from modular_lm.sweep.style import (
    INK,
    MUTED,
    OTHER,
    PAPER,
    drawing,
    label,
    styles_of,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_WIDTH = 4.6  # inches; readable on a phone, and three beside each other on a screen
_SETTLED = 0.1  # the axis of losses leaves out what is before this share of a run


def draw_all(summary: Mapping[str, Any]) -> dict[str, tuple[str, Figure]]:
    """name -> (what it shows, figure), without those that the sweep has no data for."""
    # Else it tells the user of this process, once, that it looked for fonts.
    logging.getLogger("matplotlib").setLevel(logging.WARNING)
    wanted: dict[str, tuple[str, Callable[[], Figure | None]]] = {
        "difference": ("Difference to the baseline", lambda: difference_figure(summary)),
        "flops": ("Loss against training FLOPs", lambda: curve_figure(summary, "flops")),
        "tokens": ("Loss against tokens", lambda: curve_figure(summary, "tokens")),
        "time": ("Loss against training time", lambda: curve_figure(summary, "seconds")),
        "heat_map": ("Aggregation and chunk length", lambda: heat_map(summary)),
        "pareto": ("Loss against decoding cost", lambda: pareto_figure(summary)),
    }
    found = {}
    for name, (title, draw) in wanted.items():
        with drawing(name):
            figure = draw()
        if figure is not None:
            found[name] = (title, figure)
    return found


def curve_figure(summary: Mapping[str, Any], axis: str) -> Figure | None:
    """Loss against `flops`, `tokens` or `seconds`: means over seeds, 95 % bands.

    No band where seeds are missing: of the two that are left, say, it would hide all others.
    """
    curves, styles = summary["curves"], styles_of(summary["arms"])
    if not curves["arms"]:
        return None
    figure, axes = _figure(3.5 + 0.09 * len(styles))
    whole = {arm["name"] for arm in summary["arms"] if arm["done"] == arm["trials"]}
    settled = []
    for name, curve in curves["arms"].items():
        x, style = curve[axis], styles.get(name)
        if style is None:
            axes.plot(x, curve["mean"], color=OTHER, lw=0.8, zorder=1)
        else:
            axes.plot(x, curve["mean"], label=label(name), lw=1.5, markevery=0.12, **style)
        if style is not None and name in whole and None not in curve["low"]:
            axes.fill_between(
                x, curve["low"], curve["high"], color=style["color"], alpha=0.12, lw=0
            )
            edges = {"color": style["color"], "linestyle": style["linestyle"], "alpha": 0.4}
            axes.plot(x, curve["low"], lw=0.6, **edges)
            axes.plot(x, curve["high"], lw=0.6, **edges)
        late = [y for at, y in zip(x, curve["mean"], strict=True) if at >= _SETTLED * x[-1]]
        settled += [y for y in late if math.isfinite(y)]
    if settled and max(settled) > min(settled):
        margin = 0.06 * (max(settled) - min(settled))
        axes.set_ylim(min(settled) - margin, max(settled) + margin)
    axes.set_xlim(left=0)
    axes.set_xlabel({"flops": "training FLOPs", "tokens": "tokens", "seconds": "seconds"}[axis])
    axes.set_ylabel(f"{curves['what']} (nats per token)")
    axes.margins(x=0.02)
    _legend(figure, axes, others=len(curves["arms"]) - len(styles))
    return figure


def difference_figure(summary: Mapping[str, Any]) -> Figure | None:
    """Each arm's loss less the baseline's, with its interval and the seeds that it is made of."""
    arms = [arm for arm in summary["arms"] if arm["difference"]]
    if not arms:
        return None
    arms.sort(key=lambda arm: -arm["difference"]["mean"])
    styles = styles_of(summary["arms"])
    figure, axes = _figure(1.1 + 0.24 * len(arms))
    base = next(arm["nll"]["by_seed"] for arm in summary["arms"] if arm["baseline"])
    for row, arm in enumerate(arms):
        found, style = arm["difference"], styles.get(arm["name"], {"color": MUTED, "marker": "o"})
        if found["low"] is not None:
            axes.plot([found["low"], found["high"]], [row, row], color=style["color"], lw=1.5)
        seeds = [y - base[s] for s, y in arm["nll"]["by_seed"].items() if s in base]
        axes.plot(seeds, [row] * len(seeds), "|", color=style["color"], ms=7)
        axes.plot(found["mean"], row, **{**style, "linestyle": "none"}, ms=5.5)
    axes.axvline(0, color=INK, lw=1)
    axes.locator_params(axis="x", nbins=5)
    axes.set_yticks(range(len(arms)), [label(arm["name"], 26) for arm in arms])
    axes.set_ylim(-0.6, len(arms) - 0.4)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel(
        f"loss minus that of {label(summary['baseline'], 20)}, nats per token  (left is better)"
    )
    return figure


def pareto_figure(summary: Mapping[str, Any]) -> Figure | None:
    """Loss against the state that decoding holds; the front is what no arm beats in both.

    Of arms that lack seeds none is on the front.
    """
    arms = [arm for arm in _drawn(summary) if arm["cache_bytes_per_token"]]
    if len(arms) < 2:
        return None
    styles = styles_of(summary["arms"])
    figure, axes = _figure(3.5 + 0.09 * len(styles))
    ends = []
    for arm in arms:
        style = styles.get(arm["name"], {"color": OTHER, "marker": "."})
        loss, x = arm["nll"], arm["cache_bytes_per_token"]
        ends.append(loss["mean"])
        if loss["low"] is not None:
            axes.plot([x, x], [loss["low"], loss["high"]], color=style["color"], lw=1)
            # The intervals of two seeds are so wide that nothing else could be seen.
            ends += [loss["low"], loss["high"]] if loss["n"] >= FEWEST_FOR_P else []
        own = arm["name"] in styles
        axes.plot(
            x,
            loss["mean"],
            **{**style, "linestyle": "none"},
            ms=6,
            label=label(arm["name"]) if own else None,
            zorder=3 if own else 2,
        )
    front = sorted((a["cache_bytes_per_token"], a["nll"]["mean"]) for a in arms if a["pareto"])
    x, loss = zip(*front, strict=True) if front else ((), ())
    axes.plot(x, loss, color=MUTED, lw=1, drawstyle="steps-post", zorder=1)
    margin = 0.05 * (max(ends) - min(ends)) or 0.01
    axes.set_ylim(min(ends) - margin, max(ends) + margin)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda x, _: _bytes(x))
    axes.set_xlabel("decoding state, bytes per token of context")
    axes.set_ylabel("validation loss (nats per token)")
    _legend(figure, axes, others=len(arms) - len(styles))
    return figure


def heat_map(summary: Mapping[str, Any]) -> Figure | None:
    """Mean loss by aggregation and chunk length, baselines included; the best where several fit."""
    best: dict[tuple[str, str], tuple[bool, float]] = {}  # whether seeds are missing, loss
    for arm in _drawn(summary):
        if arm["model"]:
            found = (arm["done"] < arm["trials"], arm["nll"]["mean"])
            cell = _cell(arm["model"])
            best[cell] = min(best.get(cell, found), found)
    cells = {cell: loss for cell, (_, loss) in best.items()}
    columns = sorted({column for _, column in cells}, key=lambda c: (c == "T", len(c), c))
    rows = list(dict.fromkeys(row for row, _ in cells))
    if len([c for c in columns if c != "T"]) < 2:
        return None
    from matplotlib import colormaps
    from matplotlib.colors import Normalize

    figure, axes = _figure(1.3 + 0.36 * len(rows))
    colours, norm = colormaps["cividis"], Normalize(min(cells.values()), max(cells.values()))
    for (row, column), loss in cells.items():
        x, y, colour = columns.index(column), rows.index(row), colours(norm(loss))
        axes.fill([x, x + 1, x + 1, x], [y, y, y + 1, y + 1], color=colour, lw=0)
        dark = 0.2126 * colour[0] + 0.7152 * colour[1] + 0.0722 * colour[2] < 0.5
        text = "#ffffff" if dark else "#000000"
        shown = f"{loss:.3f}" + ("*" if best[row, column][0] else "")
        axes.text(x + 0.5, y + 0.5, shown, ha="center", va="center", color=text, size=8)
    for x in range(len(columns) + 1):
        axes.axvline(x, color=PAPER, lw=1.5)
    for y in range(len(rows) + 1):
        axes.axhline(y, color=PAPER, lw=1.5)
    axes.set_xticks([i + 0.5 for i in range(len(columns))], columns)
    axes.set_yticks([i + 0.5 for i in range(len(rows))], rows)
    axes.set_xlim(0, len(columns))
    axes.set_ylim(len(rows), 0)
    axes.grid(visible=False)
    axes.tick_params(length=0)
    axes.spines[["left", "bottom"]].set_visible(False)
    note = "\n*: seeds are missing" if any(missing for missing, _ in best.values()) else ""
    axes.set_xlabel(f"chunk length or window, in tokens (T: all){note}")
    return figure


def _drawn(summary: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The arms whose losses may stand beside each other."""
    return [arm for arm in summary["arms"] if arm["nll"] and arm["comparable"]]


def _cell(model: Mapping[str, Any]) -> tuple[str, str]:
    """(row, column) of a model."""
    chunk, window = model["module_seq_len"], model["sliding_window"]
    if window is not None:
        return "window", str(window)
    if chunk is None or chunk >= model["seq_len"]:
        return "dense", "T"
    row, back = model["module_agg"], model["module_lookback"]
    if model["module_n_summary"] > 1 and row != "drop":
        row += f" m={model['module_n_summary']}"
    if back:
        row += f" + look-back {_share(back, chunk)}"
    return row, str(chunk)


def _share(back: int, chunk: int) -> str:
    """A look-back as a part of the chunk, so that it is one row for all chunk lengths."""
    if back == chunk:
        return "S"
    return f"S/{chunk // back}" if chunk % back == 0 else str(back)


def _bytes(x: float) -> str:
    for unit, size in (("Mi", 2**20), ("Ki", 2**10)):
        if x >= size:
            return f"{x / size:g} {unit}"
    return f"{x:g}"


def _figure(height: float) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH, height), layout="constrained", facecolor=PAPER)
    return figure, figure.subplots()


def _legend(figure: Figure, axes: Axes, others: int) -> None:
    if others > 0:
        axes.plot([], [], color=OTHER, lw=0.8, label=f"{others} others")
    figure.legend(loc="outside lower center", ncols=2, labelcolor=INK, handlelength=3.2)
