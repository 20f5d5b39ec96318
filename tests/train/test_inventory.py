"""When a checkpoint exists, when it is whole, and which are kept."""

from __future__ import annotations

import json
import uuid
from pathlib import Path

import pytest

from modular_lm.config.schema import CheckpointConfig, DumpEvery, SaveEvery
from modular_lm.errors import CheckpointError
from modular_lm.storage import Place, place, write_text
from modular_lm.train.inventory import (
    COMPLETE,
    complete_steps,
    describe,
    find,
    newest_step,
    retain,
    step_folder,
    sweep,
    verify,
)


@pytest.fixture(params=["disk", "memory"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    """A folder on a disk, and one in an object store."""
    return tmp_path if request.param == "disk" else place(f"memory://{uuid.uuid4().hex}/run")


def make(checkpoints: Place, step: int, *, complete: bool = True, rolling: bool = False) -> Place:
    folder = step_folder(checkpoints, step)
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("__0_0.distcp", "params.json"):
        write_text(folder / name, f"{name} of {step}")
    if complete:
        files = {p.name: describe(p) for p in folder.iterdir()}
        about = {"step": step, "files": files, **({"rolling": True} if rolling else {})}
        write_text(folder / COMPLETE, json.dumps(about))
    return folder


def names(folder: Place) -> list[str]:
    return sorted(inner.name for inner in folder.iterdir())


def test_only_complete_checkpoints_exist(root: Place) -> None:
    assert newest_step(root / "none") == 0
    make(root, 10)
    make(root, 20, complete=False)
    (root / "notes").mkdir(parents=True, exist_ok=True)
    assert complete_steps(root) == [10]
    assert newest_step(root) == 10


def test_sweep_removes_debris_and_nothing_else(root: Place) -> None:
    make(root, 10)
    make(root, 20, complete=False)
    write_text(root / "run.json", "whose they are")
    for other in ("another", "2026", "20260101120000"):
        (root / other).mkdir(parents=True, exist_ok=True)
        write_text(root / other / "notes", "not ours")
    sweep(root)
    assert names(root) == ["0000000010", "2026", "20260101120000", "another", "run.json"]
    assert complete_steps(root) == [10]


def test_find_takes_a_checkpoint_or_a_run(root: Place) -> None:
    checkpoints = root / "run" / "checkpoints"
    make(checkpoints, 10)
    newest = make(checkpoints, 20)
    torn = make(checkpoints, 30, complete=False)
    for path in (root / "run", checkpoints, newest):
        assert find(str(path)) == newest
    with pytest.raises(CheckpointError, match=f"{torn}: has no COMPLETE file"):
        find(str(torn))
    with pytest.raises(CheckpointError, match="holds no complete checkpoint"):
        find(str(root))
    with pytest.raises(CheckpointError, match="no such folder"):
        find("")


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "missing"), ("short", "truncated"), ("__0_0.distcp of 99", "damaged")],
)
def test_verify_names_the_damaged_file(root: Place, content: str | None, message: str) -> None:
    folder = make(root, 10)
    verify(folder)
    victim = folder / "__0_0.distcp"
    victim.unlink() if content is None else write_text(victim, content)
    with pytest.raises(CheckpointError, match=message) as caught:
        verify(folder)
    assert str(victim) in str(caught.value)


def test_ranks_verify_all_files_between_them(root: Place) -> None:
    folder = make(root, 10)
    write_text(folder / "params.json", "other")
    raised = []
    for part in range(3):
        try:
            verify(folder, part, 3)
        except CheckpointError:
            raised.append(part)
    assert len(raised) == 1


@pytest.mark.parametrize(
    ("dump_keep", "eval_keep", "kept"),
    [
        (2, -1, [20, 40, 50, 60]),
        (-1, -1, [10, 20, 30, 40, 50, 60]),
        (1, 1, [60]),
        (3, 1, [40, 50, 60]),
        (1, 2, [40, 60]),
        (0, 0, [10, 20, 30, 40, 50, 60]),
    ],
)
def test_retention(root: Place, dump_keep: int, eval_keep: int, kept: list[int]) -> None:
    for step in range(10, 70, 10):
        make(root, step)
    config = CheckpointConfig(DumpEvery(10, dump_keep), SaveEvery(20, eval_keep))
    gone = retain(root, config)
    assert complete_steps(root) == sorted(set(range(10, 70, 10)) - set(gone))
    # Steps 20, 40 and 60 are of both kinds.
    assert complete_steps(root) == kept


def test_a_rolling_checkpoint_stays_until_there_is_a_newer_one(root: Place) -> None:
    config = CheckpointConfig(DumpEvery(10, 3), SaveEvery(20, -1))
    for step in (10, 13, 17):
        make(root, step, rolling=step != 10)
        retain(root, config)
    assert complete_steps(root) == [10, 17]
    make(root, 20)
    retain(root, config)
    assert complete_steps(root) == [10, 20]
    # Neither does it take the place of one that is kept.
    make(root, 30)
    make(root, 31, rolling=True)
    retain(root, config)
    assert complete_steps(root) == [10, 20, 30, 31]


def test_the_end_of_a_run_is_no_rolling_one(root: Place) -> None:
    for step in (10, 14, 20):
        make(root, step)
    retain(root, CheckpointConfig(DumpEvery(10, 2), SaveEvery(0, 0)))
    assert complete_steps(root) == [14, 20]


@pytest.mark.parametrize("content", ["", "{", "[]", '{"files": 3}'])
def test_a_damaged_listing_is_named(root: Place, content: str) -> None:
    make(root, 10)
    folder = make(root, 20)
    write_text(folder / COMPLETE, content)
    with pytest.raises(CheckpointError, match=r"COMPLETE: missing or damaged.*that of step 10"):
        verify(folder)


def test_a_run_says_where_its_checkpoints_are(tmp_path: Path, root: Place) -> None:
    newest = make(root, 30)
    run = tmp_path / "a_run"
    run.mkdir()
    (run / "config.yaml").write_text(json.dumps({"checkpoint": {"path": str(root)}}))
    assert find(str(run)) == newest
