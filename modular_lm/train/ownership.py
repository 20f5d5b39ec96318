"""Whose checkpoints a folder is for: two runs must not share one.

Every run marks its folder; it is looked at where `checkpoint.path` names one, which may be another
run's, also that below its `dump_dir`. Imports no torch.
"""

from __future__ import annotations

import json
from pathlib import Path

from modular_lm.errors import CheckpointError, ConfigError
from modular_lm.storage import Place, write_text
from modular_lm.train.inventory import newest_step

OWNER = "run.json"


def claim(checkpoints: Place, uid: str, dump_dir: Path) -> None:
    """Make this the folder of one run's checkpoints."""
    checkpoints.mkdir(parents=True, exist_ok=True)
    write_text(checkpoints / OWNER, json.dumps({"uid": uid, "dump_dir": str(dump_dir)}))


def check_owner(checkpoints: Place, uid: str | None, dump_dir: Path) -> None:
    """Raise ConfigError if the folder is another run's than that of `uid` (None: not begun)."""
    try:
        theirs = json.loads((checkpoints / OWNER).read_text())
        other_uid, other_dir = theirs["uid"], theirs["dump_dir"]
    except (FileNotFoundError, NotADirectoryError):
        if uid is None and (step := newest_step(checkpoints)):
            raise ConfigError(
                f"checkpoint.path={checkpoints}: holds checkpoints already, the latest of step "
                f"{step}, and this run is new; choose an empty place (to start from their weights: "
                "checkpoint.init_ckpt_path)"
            ) from None
        return
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{checkpoints / OWNER}: damaged, delete it: {error}") from error
    # A run that was given up before its first checkpoint begins anew, under another uid.
    given_up = other_dir == str(dump_dir) and newest_step(checkpoints) == 0
    if other_uid != uid and not given_up:
        raise ConfigError(
            f"checkpoint.path={checkpoints}: is the place of another run's checkpoints (dump_dir="
            f"{other_dir}); choose one of its own for each run"
        )


def check_moved(checkpoints: Place, before: Place) -> None:
    """Raise ConfigError if a run's checkpoints are still where it saved them before."""
    if before != checkpoints and newest_step(before) and not newest_step(checkpoints):
        raise ConfigError(
            f"checkpoint.path={checkpoints}: the checkpoints of this run are in {before}; copy "
            "them there, or leave this key as it was"
        )
