"""Colours, markers and dashes of the report: seen on their ground, and told apart by everyone."""

from __future__ import annotations

import itertools
import re

import numpy as np
import pytest

from modular_lm.sweep.style import COLOURS, styles_of

# sRGB to XYZ, the white of D65 being 1.
XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
# What is seen of linear sRGB: Machado, Oliveira and Fernandes (2009), severity 1.
SIGHT = {
    "all cones": np.eye(3),
    "protanopia": np.array(
        [
            [0.152286, 1.052583, -0.204868],
            [0.114503, 0.786281, 0.099216],
            [-0.003882, -0.048116, 1.051998],
        ]
    ),
    "deuteranopia": np.array(
        [
            [0.367322, 0.860646, -0.227968],
            [0.280085, 0.672501, 0.047413],
            [-0.011820, 0.042940, 0.968881],
        ]
    ),
    "tritanopia": np.array(
        [
            [1.255528, -0.076749, -0.178779],
            [-0.078411, 0.930809, 0.147602],
            [0.004733, 0.691367, 0.303900],
        ]
    ),
}


def _linear(colour: str) -> np.ndarray:
    parts = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    return np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)


def _luminance(colour: str) -> float:
    return float(XYZ[1] @ _linear(colour))


def _lab(linear: np.ndarray) -> np.ndarray:
    """CIELAB of linear sRGB."""
    parts = XYZ @ np.clip(linear, 0, 1) / XYZ.sum(1)
    f = np.where(parts > 216 / 24389, np.cbrt(parts), (24389 / 27 * parts + 16) / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("sight", SIGHT)
@pytest.mark.parametrize("theme", [0, 1])
def test_series_are_told_apart_by_colour_blind_people(theme: int, sight: str) -> None:
    """A difference in CIELAB of 2 is just seen side by side; thin lines apart take several times
    that."""
    names = [name for name in COLOURS if re.fullmatch(r"s\d", name)] + ["ink", "other"]
    seen = {name: _lab(SIGHT[sight] @ _linear(COLOURS[name][theme])) for name in names}
    for one, other in itertools.combinations(names, 2):
        assert np.linalg.norm(seen[one] - seen[other]) >= 15, (one, other)


def test_every_series_has_dashes_and_a_marker_of_its_own() -> None:
    arms = [
        {
            "name": str(i),
            "baseline": i == 0,
            "rank": i + 1,
            "nll": {"mean": 1.0},
            "model": {},
            "done": 3,
        }
        | {"trials": 3, "comparable": True}
        for i in range(8)
    ]
    styles = styles_of(arms).values()
    for key in ("color", "marker", "linestyle"):
        assert len({str(style[key]) for style in styles}) == 8


@pytest.mark.parametrize("theme", [0, 1])
def test_text_and_lines_stand_out_from_their_ground(theme: int) -> None:
    """The contrast that WCAG asks for: 4.5 for text, 3 for lines and marks."""
    paper = _luminance(COLOURS["paper"][theme])
    for name, pair in COLOURS.items():
        if name in ("paper", "grid", "other"):
            continue
        light, dark = sorted((paper, _luminance(pair[theme])), reverse=True)
        wanted = 4.5 if name in ("ink", "muted", "s2", "s3") else 3.0  # s2, s3: the verdicts
        assert (light + 0.05) / (dark + 0.05) >= wanted, name
