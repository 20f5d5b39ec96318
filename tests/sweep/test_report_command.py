"""Reports as a command, and against another variant than the sweep's own baseline."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from modular_lm.errors import ConfigError
from modular_lm.sweep.report import write_report
from modular_lm.sweep.summary import summarise
from tests.support import REPO
from tests.sweep.made_sweep import begun, finish_all
from tests.sweep.test_report import ARMS, LOSSES, arm


def test_another_baseline_has_a_report_of_its_own(tmp_path: Path) -> None:
    folder, plan = begun(tmp_path / "s", ARMS)
    finish_all(folder, plan, LOSSES)
    before = summarise(folder)
    found = write_report(folder, "window")
    assert found["baseline"] == "window"
    assert arm(found, "window")["difference"] is None
    differences = [a - b for a, b in zip(LOSSES["dense"], LOSSES["window"], strict=True)]
    difference = arm(found, "dense")["difference"]
    assert difference["mean"] == pytest.approx(np.mean(differences))
    assert difference["p"] == pytest.approx(stats.ttest_1samp(differences, 0)[1])
    where = tmp_path / "s" / "against" / "window"
    assert {"report.html", "report.md", "report.json", "pictures"} == {
        path.name for path in where.iterdir()
    }
    # The sweep's own is as it was.
    assert summarise(folder)["arms"] == before["arms"]
    assert not folder.report("html").exists()
    with pytest.raises(ConfigError, match=r"baseline=windw: .* did you mean window\?"):
        write_report(folder, "windw")
    assert not (tmp_path / "s" / "against" / "windw").exists()


def report(*args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ray_jobs.report", *args]
    return subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=120)


def test_the_command(tmp_path: Path) -> None:
    folder, plan = begun(tmp_path / "made", ARMS)
    finish_all(folder, plan, LOSSES)
    done = report(f"dir={folder.path}")
    assert done.returncode == 0
    assert "12 of 15 trials are done" in done.stdout
    assert str(folder.report("html")) in done.stdout
    other = report(f"dir={folder.path}", "baseline=window")
    assert other.returncode == 0
    assert str(folder.against("window").report("html")) in other.stdout
    occupied, _ = begun(tmp_path / "occupied", ARMS)
    occupied.pictures.write_text("")
    blocked = report(f"dir={occupied.path}")
    assert (blocked.returncode, blocked.stderr.count("\n")) == (1, 1)
    assert "pictures: cannot be written" in blocked.stderr
    for args, message in (
        ((), "error: dir=: expected the folder of a sweep\n"),
        ((f"dir={tmp_path}",), "with sweep.yaml in it\n"),
        (("dri=x",), "did you mean dir?\n"),
        ((f"dir={folder.path}", "baseline=windw"), "(it has dense, window, avg, stack, odd)\n"),
    ):
        found = report(*args)
        assert found.returncode == 2
        assert found.stderr.endswith(message)
        assert found.stderr.count("\n") == 1
