"""Figures of a run, drawn from its files. What is drawn is measured in `eval`.

Matplotlib, which MLflow brings along, is imported on first use, and without `pyplot`: that one
keeps every figure in a state of the whole process, and these are drawn in threads.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COSTLY = 3  # the first positions of a chunk, where nearly all of chunking's cost is
_SINGLE = 8  # so many first positions are drawn one by one, the others in widening groups
_WIDENING = 2**0.25


def position_figure(report: Mapping[str, Any]) -> Figure:
    """Draw a `positions.json` (see `eval.positions`): loss by position in chunk, and by chunk.

    A line per source and a black one for all of them together; on the left the chunks after the
    first, for `all` the first chunks too, dotted.
    """
    # Else it tells the user of this process, once, that it looked for fonts.
    logging.getLogger("matplotlib").setLevel(logging.WARNING)
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.8), dpi=110, layout="constrained")
    left, right = figure.subplots(1, 2)
    chunk_len, sources = report["chunk_len"], report["sources"]
    figure.suptitle(f"Validation loss at step {report['step']}, in chunks of {chunk_len} tokens")
    total = "all" if "all" in sources else next(iter(sources))
    for name, curves in sources.items():
        style = {"color": "black", "lw": 2, "zorder": 3} if name == total else {"lw": 1.2}
        _draw_positions(left, curves["position_in_later_chunks"], label=name, **style)
        _draw_chunks(right, curves["chunk_index"], label=name, **style)
    first = sources[total]["position_in_first_chunk"]
    _draw_positions(left, first, label=f"{total}, first chunk", color="black", ls=":")
    _finish_positions(left, chunk_len)
    _finish_chunks(right, sources[total]["chunk_index"]["count"])
    return figure


def _draw_positions(axes: Axes, curve: Mapping[str, list[Any]], **style: Any) -> None:
    points = grouped(curve["nll"], curve["count"])
    axes.plot([x for x, _ in points], [y for _, y in points], marker=".", **style)


def _draw_chunks(axes: Axes, curve: Mapping[str, list[Any]], **style: Any) -> None:
    points = [(k, nll) for k, nll in enumerate(curve["nll"]) if nll is not None]
    axes.plot([x for x, _ in points], [y for _, y in points], marker=".", **style)


def _finish_positions(axes: Axes, chunk_len: int) -> None:
    # Logarithmic, but from 0 on.
    axes.set_xscale("function", functions=(np.log1p, np.expm1))
    axes.set_xticks([0, *(2**i for i in range(chunk_len.bit_length()) if 2**i < chunk_len)])
    axes.axvspan(-0.4, min(_COSTLY, chunk_len) - 0.6, color="gold", alpha=0.2, lw=0)
    axes.set_title(f"by position in chunk, chunks after the first (shaded: the first {_COSTLY})")
    axes.set_xlabel(f"position in chunk, 0 to {chunk_len - 1} (tokens, logarithmic)")
    axes.set_ylabel("loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")


def _finish_chunks(axes: Axes, count: list[int]) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_title("by chunk of the document (grey: tokens scored)")
    axes.set_xlabel("chunk index")
    axes.set_ylabel("loss (nats per token)")
    axes.grid(alpha=0.3)
    tokens = axes.twinx()
    tokens.bar(range(len(count)), count, color="grey", alpha=0.2, width=0.9)
    tokens.set_ylabel("tokens", color="grey")
    tokens.tick_params(axis="y", colors="grey")
    # The lines above the bars, which a second axis would cover them with.
    axes.set_zorder(tokens.get_zorder() + 1)
    axes.patch.set_visible(False)


def grouped(nll: Sequence[float | None], count: Sequence[int]) -> list[tuple[float, float]]:
    """(position, mean nll) points: the first positions one by one, later ones in widening groups.

    Far positions are many and noisy, and lie close together on a logarithmic axis. A group stands
    at the middle of its positions; means are over tokens; groups without any are left out.
    """
    points, start, width = [], 0, 1.0
    while start < len(nll):
        stop = min(len(nll), start + round(width))
        group = zip(nll[start:stop], count[start:stop], strict=True)
        known = [(mean, n) for mean, n in group if mean is not None]
        if tokens := sum(n for _, n in known):
            points.append(((start + stop - 1) / 2, sum(mean * n for mean, n in known) / tokens))
        start = stop
        width = max(1.0, start * (_WIDENING - 1)) if start >= _SINGLE else 1.0
    return points
