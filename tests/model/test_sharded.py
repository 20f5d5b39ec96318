from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

WORKER = Path(__file__).with_name("sharded_worker.py")


@pytest.mark.parametrize("size", [3])  # divides no width, so that shards are uneven
def test_three_ranks_train_as_one_process_from_the_same_weights(tmp_path: Path, size: int) -> None:
    store = tmp_path / "store"
    commands = [[sys.executable, WORKER, str(rank), str(size), store] for rank in range(size)]
    ranks = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for command in commands]
    errors = [rank.communicate(timeout=120)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0] * size, "\n".join(errors)
