"""When a checkpoint exists, when it is whole, and which are kept."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from modular_lm.config.schema import CheckpointConfig, DumpEvery, SaveEvery
from modular_lm.errors import CheckpointError
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


def make(checkpoints: Path, step: int, *, complete: bool = True) -> Path:
    folder = step_folder(checkpoints, step)
    folder.mkdir(parents=True)
    for name in ("__0_0.distcp", "params.json"):
        (folder / name).write_text(f"{name} of {step}")
    if complete:
        files = {p.name: describe(p) for p in folder.iterdir()}
        (folder / COMPLETE).write_text(json.dumps({"step": step, "files": files}))
    return folder


def test_only_complete_checkpoints_exist(tmp_path: Path) -> None:
    assert newest_step(tmp_path / "none") == 0
    make(tmp_path, 10)
    make(tmp_path, 20, complete=False)
    (tmp_path / "notes").mkdir()
    assert complete_steps(tmp_path) == [10]
    assert newest_step(tmp_path) == 10


def test_sweep_removes_debris_and_nothing_else(tmp_path: Path) -> None:
    make(tmp_path, 10)
    make(tmp_path, 20, complete=False)
    sweep(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["0000000010"]


def test_find_takes_a_checkpoint_or_a_run(tmp_path: Path) -> None:
    checkpoints = tmp_path / "run" / "checkpoints"
    make(checkpoints, 10)
    newest = make(checkpoints, 20)
    torn = make(checkpoints, 30, complete=False)
    for path in (tmp_path / "run", checkpoints, newest):
        assert find(str(path)) == newest
    with pytest.raises(CheckpointError, match=f"{torn}: has no COMPLETE file"):
        find(str(torn))
    with pytest.raises(CheckpointError, match="holds no complete checkpoint"):
        find(str(tmp_path))
    with pytest.raises(CheckpointError, match="no such folder"):
        find("")


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "missing"), ("short", "truncated"), ("__0_0.distcp of 99", "damaged")],
)
def test_verify_names_the_damaged_file(tmp_path: Path, content: str | None, message: str) -> None:
    folder = make(tmp_path, 10)
    verify(folder)
    victim = folder / "__0_0.distcp"
    victim.unlink() if content is None else victim.write_text(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        verify(folder)
    assert str(victim) in str(caught.value)


def test_ranks_verify_all_files_between_them(tmp_path: Path) -> None:
    folder = make(tmp_path, 10)
    (folder / "params.json").write_text("other")
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
        (2, -1, [20, 30, 40, 50, 60]),
        (-1, -1, [10, 20, 30, 40, 50, 60]),
        (1, 1, [50, 60]),
        (0, 0, [10, 20, 30, 40, 50, 60]),
    ],
)
def test_retention(tmp_path: Path, dump_keep: int, eval_keep: int, kept: list[int]) -> None:
    for step in range(10, 70, 10):
        make(tmp_path, step)
    config = CheckpointConfig(DumpEvery(10, dump_keep), SaveEvery(20, eval_keep))
    gone = retain(tmp_path, config)
    assert complete_steps(tmp_path) == sorted(set(range(10, 70, 10)) - set(gone))
    # Steps 20, 40 and 60 are evaluation checkpoints, 10, 30 and 50 are not.
    assert complete_steps(tmp_path) == kept
