"""Every mesh loads what every mesh has saved: weights, optimizer, schedule, data position and
random numbers to the bit, and goes on as if nothing had happened.

`make test` runs `PAIRWISE`, `make chaos` the full product. What can be run alone is a mesh that
saves (`-k "by_hsdp-2x2"`), and in the full product one kind of model of it.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

from tests.pool import Pool
from tests.train.matrix import END, KINDS, MESHES, PAIRWISE, SAVED_AT, Kind, Mesh, Seen, load, save

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

# How far losses may differ after the checkpoint where another mesh goes on: sums in another order.
ROUNDING = {"fp32": 1e-5, "bf16": 2e-2}


def properties(saver: Mesh, loader: Mesh, kind: Kind) -> dict[str, Any]:
    return {
        "saver": saver,
        "loader": loader,
        "dtype": kind.dtype,
        "agg": kind.agg,
        "column": kind.column,
        "optimizer": kind.optimizer,
    }


def test_any_two_properties_meet() -> None:
    chosen = [properties(*case) for case in PAIRWISE]
    every = [properties(*case) for case in itertools.product(MESHES, MESHES, KINDS)]
    for one, other in itertools.combinations(every[0], 2):
        assert {(c[one], c[other]) for c in chosen} == {(c[one], c[other]) for c in every}


def check(saved: list[Seen], loaded: list[Seen], same_mesh: bool, dtype: str) -> None:
    """That what was loaded is what was saved, and led on to the same."""
    whole = saved[0]
    for rank, seen in enumerate(loaded):
        assert seen.middle == whole.middle
        assert seen.state == {name: whole.state[name] for name in seen.state}
        if rank < len(saved):
            assert seen.random == saved[rank].random
        after = whole.lines[SAVED_AT:]
        for name in ("global_step", "optim/lr", "optim/total_tokens", "data/digest"):
            assert [line[name] for line in seen.lines] == [line[name] for line in after], name
        losses, expected = ([line["loss/out"] for line in x] for x in (seen.lines, after))
        if same_mesh:
            assert losses == expected
            assert seen.end == whole.end
        else:
            assert losses == pytest.approx(expected, rel=ROUNDING[dtype])


def saved_by(pool: Pool, mesh: Mesh, folder: Path, kind: Kind) -> list[Seen]:
    saved = pool.run(mesh.ranks, save, folder, mesh, kind)
    assert any("/" in name for name in saved[0].middle), "an optimizer's state"
    assert len({seen.random for seen in saved}) == mesh.ranks
    assert saved[0].middle != saved[0].end
    assert len(saved[0].lines) == END
    assert all((rank.middle, rank.end) == (saved[0].middle, saved[0].end) for rank in saved)
    return saved


@pytest.mark.parametrize("saver", MESHES, ids="by_{}".format)
def test_every_mesh_loads_what_one_has_saved(pool: Pool, tmp_path: Path, saver: Mesh) -> None:
    done: dict[Kind, list[Seen]] = {}
    for mesh, loader, kind in PAIRWISE:
        if mesh != saver:
            continue
        folder = tmp_path / str(kind)
        if kind not in done:
            done[kind] = saved_by(pool, saver, folder, kind)
        loaded = pool.run(loader.ranks, load, folder, loader, kind)
        check(done[kind], loaded, saver == loader, kind.dtype)


@pytest.mark.chaos
@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("saver", MESHES, ids="by_{}".format)
def test_every_mesh_loads_every_kind(pool: Pool, tmp_path: Path, saver: Mesh, kind: Kind) -> None:
    saved = saved_by(pool, saver, tmp_path, kind)
    for loader in MESHES:
        check(
            saved, pool.run(loader.ranks, load, tmp_path, loader, kind), saver == loader, kind.dtype
        )
