"""What stands still is noticed, told of and ended; what is slow or goes on is not."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from modular_lm.files import lock
from modular_lm.tracking.run_folder import RunFolder
from modular_lm.train import watchdog as module
from modular_lm.train.watchdog import Watchdog, describe
from tests.support import wait_until

pytestmark = pytest.mark.timeout(120)
# Stands still in a lock that its parent holds, after three steps.
STUCK = """
import sys
from pathlib import Path
from modular_lm.files import lock
from modular_lm.tracking.run_folder import RunFolder
from modular_lm.train.watchdog import Watchdog
folder = RunFolder(sys.argv[1])
watchdog = Watchdog(folder, 1, 0.2, lambda: print("told", flush=True))
watchdog.beat(3)
with lock(folder.ray / "held"):
    print("not stuck")
"""


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    folder = RunFolder(tmp_path / "run")
    folder.create()
    return folder


def test_a_process_that_stands_still_leaves_word_and_ends(folder: RunFolder) -> None:
    with lock(folder.ray / "held"):
        command = [sys.executable, "-c", STUCK, str(folder.path)]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert (ended.returncode, ended.stdout) == (1, "told\n"), ended.stderr
    report = folder.stuck()[1]
    assert (report["step"], report["phase"]) == (3, "step")
    assert report["where"].startswith("_acquire (files.py:")
    log = folder.log_file(1).read_text()
    assert "in _acquire" in log
    assert "in <module>" in log, "the whole stack"
    message = describe(folder, 2)
    assert message is not None
    assert "rank 0 silent, without a stack; rank 1 in _acquire" in message
    assert "after step 3" in message


def test_what_goes_on_is_let_live_and_its_word_taken_back(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_GRACE_S", 1000)
    watchdog = Watchdog(folder, 0, 0.1)
    watchdog.beat(1)
    wait_until(folder.stuck, "a report", 60)
    wait_until(lambda: watchdog.beat(2) or not folder.stuck(), "its end", 60)
    wait_until(folder.stuck, "another report", 60)
    watchdog.close()
    wait_until(lambda: not folder.stuck(), "its end", 60)
    assert describe(folder, 1) is None


def test_closed_or_without_a_limit_nothing_is_watched(folder: RunFolder) -> None:
    Watchdog(folder, 0, 0.05).close()
    Watchdog(folder, 0, 0.0)
    wait_until(lambda: all(t.name != "watchdog" for t in threading.enumerate()), "its end", 60)
    assert not folder.stuck()


def test_limits_grow_with_the_slowest_step_and_with_phases(folder: RunFolder) -> None:
    watchdog = Watchdog(folder, 0, 1000.0)
    try:
        assert watchdog._limit() == 6000, "loading and the first step"
        watchdog.beat(1)
        assert watchdog._limit() == 1000
        with watchdog.phase("saving"):
            assert watchdog._limit() == 6000
        watchdog._since = time.monotonic() - 300
        watchdog.beat(2)
        assert watchdog._limit() == pytest.approx(3000, rel=0.01)
    finally:
        watchdog.close()


def test_many_ranks_are_named_by_place(folder: RunFolder) -> None:
    for rank in range(1, 20):
        folder.stuck_file(rank).parent.mkdir(parents=True, exist_ok=True)
        where = "wait (threading.py:1)" if rank == 5 else "all_reduce (x.py:2)"
        report = {"step": None, "phase": "start", "seconds": 61.2, "where": where}
        folder.stuck_file(rank).write_text(json.dumps(report))
    message = describe(folder, 20)
    assert message is not None
    assert message.startswith("no progress for 61 s (start, before the first step): rank 0 silent")
    assert "ranks 1, 2, 3, 4, 6, 7, 8, 9, ... in all_reduce (x.py:2); rank 5 in wait" in message
