"""What a figure of the loss by position shows."""

from __future__ import annotations

import io
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from matplotlib.lines import Line2D

from modular_lm.tracking.figures import grouped, position_figure


def curve(nll: list[float | None]) -> dict[str, Any]:
    return {"nll": nll, "count": [0 if value is None else 10 for value in nll]}


def report(*sources: str) -> dict[str, Any]:
    """Of documents of at most three chunks of four tokens, the third without any."""
    curves = {
        "position_in_chunk": curve([4.0, 3.0, 2.0, 1.0]),
        "position_in_first_chunk": curve([5.0, 4.0, 3.0, 2.0]),
        "position_in_later_chunks": curve([3.0, 2.0, 1.0, None]),
        "chunk_index": curve([3.5, 2.0, None]),
    }
    return {"step": 12, "chunk_len": 4, "sources": dict.fromkeys(sources, curves)}


def data(line: Line2D) -> list[list[float]]:
    return np.asarray(line.get_xydata()).tolist()


def test_a_line_per_source_and_what_it_means() -> None:
    figure = position_figure(report("wiki", "code", "all"))
    left, right, tokens = figure.axes
    lines = {str(line.get_label()): line for line in left.lines}
    assert list(lines) == ["wiki", "code", "all", "all, first chunk"]
    assert data(lines["wiki"]) == [[0, 3], [1, 2], [2, 1]]
    assert data(lines["all, first chunk"]) == [[0, 5], [1, 4], [2, 3], [3, 2]]
    assert [data(line) for line in right.lines] == [[[0, 3.5], [1, 2]]] * 3
    assert [bar.get_extents().height > 0 for bar in tokens.patches] == [True, True, False]
    assert figure.get_suptitle() == "Validation loss at step 12, in chunks of 4 tokens"
    assert "position in chunk" in left.get_xlabel()
    assert right.get_xlabel() == "chunk index"
    assert left.get_ylabel() == right.get_ylabel() == "loss (nats per token)"


def test_one_source_stands_for_all() -> None:
    left, right, _ = position_figure(report("wiki")).axes
    assert [str(line.get_label()) for line in left.lines] == ["wiki", "wiki, first chunk"]
    assert [line.get_color() for line in right.lines] == ["black"]


@pytest.mark.parametrize("chunk_len", [1, 2, 3, 1000])
def test_any_chunk_length_can_be_drawn(chunk_len: int) -> None:
    empty, full = curve([None] * chunk_len), curve([1.0] * chunk_len)
    names = ("position_in_chunk", "position_in_first_chunk")
    curves = dict.fromkeys(names, full) | {"position_in_later_chunks": empty}
    curves["chunk_index"] = curve([1.0, None])
    image = io.BytesIO()
    found = {"step": 1, "chunk_len": chunk_len, "sources": {"wiki": curves}}
    position_figure(found).savefig(image)
    assert image.getvalue().startswith(b"\x89PNG")


def test_drawing_leaves_no_state_in_the_process() -> None:
    script = (
        "import sys; from modular_lm.tracking import MlflowProjection; "
        "assert 'matplotlib' not in sys.modules; "
        "from tests.tracking.test_figures import *; position_figure(report('a')); "
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# ------------------------------------------------------------------ groups


def test_first_positions_stand_alone_and_later_ones_together() -> None:
    points = grouped([float(i) for i in range(200)], [1] * 200)
    assert points[:8] == [(i, i) for i in range(8)]
    # Of a straight line every group's mean lies at the group's middle.
    assert all(x == pytest.approx(y) for x, y in points)
    assert len(points) < 40
    assert points[-1][0] > 170


def test_means_of_groups_are_over_tokens() -> None:
    points = dict(grouped([2.0] * 8 + [5.0, 2.0], [1] * 8 + [3, 1]))
    assert points[8.5] == (3 * 5.0 + 2.0) / 4


def test_positions_without_tokens_are_left_out() -> None:
    assert grouped([1.0, None, 0.0], [2, 0, 2]) == [(0, 1.0), (2, 0.0)]
    assert grouped([None], [0]) == []
