"""Two runs do not share a folder of checkpoints, and a run does not lose sight of its own."""

from __future__ import annotations

import uuid
from pathlib import Path

import pytest

from modular_lm.errors import CheckpointError, ConfigError
from modular_lm.storage import Place, place, write_text
from modular_lm.train.ownership import OWNER, check_moved, check_owner, claim
from tests.train.test_inventory import make


@pytest.fixture(params=["disk", "memory"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    return tmp_path / "x" if request.param == "disk" else place(f"memory://{uuid.uuid4().hex}/x")


def test_a_folder_has_one_owner(root: Place) -> None:
    check_owner(root, None, Path("/runs/a"))
    claim(root, "a", Path("/runs/a"))
    check_owner(root, "a", Path("/runs/a"))
    check_owner(root, "a", Path("/moved/a"))
    for uid, folder in (("b", "/runs/b"), (None, "/runs/b")):
        with pytest.raises(ConfigError, match=r"^checkpoint\.path=.*another run's.*=/runs/a"):
            check_owner(root, uid, Path(folder))


def test_a_run_that_was_given_up_before_its_first_checkpoint_may_begin_anew(root: Place) -> None:
    claim(root, "a", Path("/runs/a"))
    check_owner(root, "b", Path("/runs/a"))
    make(root, 10)
    with pytest.raises(ConfigError, match="another run's"):
        check_owner(root, "b", Path("/runs/a"))


def test_a_new_run_takes_no_place_that_holds_checkpoints(root: Place) -> None:
    make(root, 10)
    check_owner(root, "a", Path("/runs/a"))  # they were copied there without the mark
    with pytest.raises(ConfigError, match=r"^checkpoint\.path=.*holds checkpoints already"):
        check_owner(root, None, Path("/runs/b"))


def test_a_damaged_mark_is_named(root: Place) -> None:
    root.mkdir(parents=True, exist_ok=True)
    write_text(root / OWNER, "{}")
    with pytest.raises(CheckpointError, match=f"{OWNER}: damaged"):
        check_owner(root, "a", Path("/runs/a"))


def test_checkpoints_left_behind_are_not_forgotten(root: Place) -> None:
    before, now = root / "before", root / "now"
    check_moved(now, before)
    make(before, 10)
    with pytest.raises(ConfigError, match=r"the checkpoints of this run are in .*before; copy"):
        check_moved(now, before)
    check_moved(before, before)
    make(now, 10)
    check_moved(now, before)
