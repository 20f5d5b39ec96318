"""Loss and gradients of every way to spread a model, against one process (benchmarks.numerics)."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.numerics import COMBINATIONS, Combination, compare, step
from tests.pool import Pool

pytestmark = pytest.mark.slow

# group -> how far loss, gradients and their norm may be off. In fp32 sums in another order; bf16
# rounds what tensor parallelism adds up over ranks, float8 scales by what a rank sees.
LIMITS = {
    "dtype": (1e-3, 0.1, 1e-2),
    "float8": (2e-3, 0.8, 5e-2),
}
EXACT = (1e-6, 1e-5, 1e-6)
COMPILED = [
    pytest.param(c, marks=pytest.mark.chaos if c.ranks > 1 else ())
    for c in COMBINATIONS
    if c.group == "compile"
]
ALONE: dict[str, Any] = {}


@pytest.mark.parametrize(
    "combination",
    [*(c for c in COMBINATIONS if c.group != "compile"), *COMPILED],
    ids=lambda c: f"{c.group}: {c.name}",
)
def test_it_is_what_one_process_computes(pool: Pool, combination: Combination) -> None:
    c = combination
    if c.of not in ALONE:
        (ALONE[c.of],) = pool.run(1, step, c.of)
    found = compare(c, ALONE[c.of], pool.run(c.ranks, step, f"{c.of} {c.keys}"))
    loss, gradients, norm = LIMITS.get(c.group, EXACT)
    assert found.loss <= loss
    assert found.gradients <= gradients, found.parameter
    assert found.norm <= norm


def test_every_rank_reports_the_same_loss_and_norm(pool: Pool) -> None:
    """Also those of which only one in a group has the rows."""
    results = pool.run(4, step, "distributed.tp_size=2 data.batch_size=1")
    assert len({(loss, norm) for loss, norm, _ in results}) == 1
