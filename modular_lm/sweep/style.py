"""How a sweep's figures and page look: one palette, light and dark, and a style for each arm.

Colours differ in lightness as well as in hue, so that colour-blind people tell them apart, and have
a contrast of at least 3:1 to their ground; markers and dashes say the same again. Figures are drawn
in the light colours; in the page each of these codes becomes a variable, which the dark theme sets
anew.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# name -> (light, dark). The light ones are unique, for they are found again in the SVG.
COLOURS: dict[str, tuple[str, str]] = {
    "paper": ("#fefefe", "#16181b"),
    "ink": ("#1b1d20", "#eceef0"),
    "muted": ("#5c6269", "#a3abb3"),
    "grid": ("#dfe2e6", "#33383e"),
    "other": ("#b4b9bf", "#575e66"),
    "s1": ("#159bd4", "#3db4ee"),
    "s2": ("#b80000", "#f09868"),
    "s3": ("#007d5a", "#6effbb"),
    "s4": ("#a8028f", "#e60ba6"),
    "s5": ("#b78b00", "#ffd315"),
    "s6": ("#0900ff", "#4c6eff"),
    "s7": ("#fe0770", "#f6061f"),
}
INK, MUTED, GRID, PAPER, OTHER = (COLOURS[n][0] for n in ("ink", "muted", "grid", "paper", "other"))
_SERIES = [light for name, (light, _) in COLOURS.items() if re.fullmatch(r"s\d", name)]
_MARKERS = ("s", "^", "D", "v", "P", "X", "*")
_DASHES = (
    (0, (5, 1.5)),
    (0, (1, 1)),
    (0, (4, 1.5, 1, 1.5)),
    (0, (9, 2)),
    (0, (3, 1, 1, 1, 1, 1)),
    (0, (2, 2.5)),
    (0, (7, 1.5, 2, 1.5)),
)

_RC: dict[Any, Any] = {
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "axes.facecolor": "none",
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.7,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.markersize": 4,
    "svg.fonttype": "none",  # text stays text
}


@contextmanager
def drawing(name: str) -> Iterator[None]:
    """Draw, or write, the figure of that name in this style."""
    import matplotlib

    # The same figure is the same file; those of two figures in a page have different ids.
    with matplotlib.rc_context({**_RC, "svg.hashsalt": name}):
        yield


def shown(arms: Sequence[Mapping[str, Any]]) -> list[str]:
    """The arms that have a style of their own, the others that are comparable are drawn in grey.

    All where there are few; else the baseline, the best ones without chunks (what chunking must
    beat), and the best of all.
    """
    room = 1 + len(_SERIES)
    measured = [arm for arm in arms if arm["nll"] and arm["comparable"]]
    ranked = sorted(measured, key=lambda arm: arm["rank"])
    whole = [arm for arm in ranked if arm["model"] and arm["model"]["module_seq_len"] is None]
    first = [arm for arm in ranked if arm["baseline"]]
    chosen: list[str] = []
    for arm in (*first, *whole[:2], *ranked):
        if arm["name"] not in chosen and len(chosen) < room:
            chosen.append(arm["name"])
    return [arm["name"] for arm in measured if arm["name"] in chosen]


def styles_of(arms: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Colour, marker and dashes of each arm that has its own style, hollow where seeds are missing.

    These are arguments of matplotlib's `plot`.
    """
    names = shown(arms)
    own = iter(zip(_SERIES, _MARKERS, _DASHES, strict=True))
    found = {}
    for arm in arms:
        if arm["name"] in names:
            color, marker, dashes = (INK, "o", "-") if arm["baseline"] else next(own)
            filled = color if arm["done"] == arm["trials"] else PAPER
            found[arm["name"]] = {
                "color": color,
                "marker": marker,
                "linestyle": dashes,
                "markerfacecolor": filled,
            }
    return found


def label(name: str, longest: int = 34) -> str:
    """An arm's name as it stands in a figure."""
    text = name.replace("module_", "").replace("__", " ")
    return text if len(text) <= longest else text[: longest - 1] + "…"


def svg(figure: Figure, name: str) -> str:
    """The figure as an SVG file in the light colours, the same bytes for the same figure."""
    buffer = io.StringIO()
    with drawing(name):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return buffer.getvalue()


def inline(picture: str, title: str) -> str:
    """An SVG file as an element of a page whose colours are the page's variables."""
    body = picture[picture.index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", body, count=1)
    body = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", body, count=1)
    body = body.replace("<svg", f'<svg role="img" aria-label="{title}"', 1)
    for colour, (light, _) in COLOURS.items():
        body = body.replace(light, f"var(--{colour})")
    return body


def variables(theme: int) -> str:
    """The CSS variables of a theme: 0 light, 1 dark."""
    return " ".join(f"--{name}: {pair[theme]};" for name, pair in COLOURS.items())
