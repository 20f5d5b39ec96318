"""The copy of the code that ran."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

import modular_lm
from modular_lm.errors import RunFailedError
from modular_lm.tracking.snapshot import snapshot_code


def _checkout(root: Path) -> None:
    package = root / "modular_lm"
    (package / "__pycache__").mkdir(parents=True)
    (root / "configs").mkdir()
    (root / "data").mkdir()
    (package / "__init__.py").write_text("x = 1\n")
    (package / "__pycache__" / "x.cpython-311.pyc").write_text("")
    (package / "weights.bin").write_bytes(bytes(2 << 20))
    (root / "configs" / "debug.yaml").write_text("name: x\n")
    (root / "data" / "text.jsonl").write_text("{}\n")
    (root / "pyproject.toml").write_text("")


def _git(root: Path, *args: str) -> str:
    identity = ("-c", "user.name=t", "-c", "user.email=t@localhost")
    command = ["git", "-C", str(root), *identity, *args]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = tmp_path / "checkout"
    _checkout(root)
    monkeypatch.setattr(modular_lm, "__file__", str(root / "modular_lm" / "__init__.py"))
    return root


def _files(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}


def test_copies_sources_and_configs_only(checkout: Path, tmp_path: Path) -> None:
    snapshot_code(tmp_path / "run" / "code")
    assert _files(tmp_path / "run" / "code") == {
        "modular_lm/__init__.py",
        "configs/debug.yaml",
        "pyproject.toml",
        "snapshot.json",
    }


def test_replaces_an_older_snapshot(checkout: Path, tmp_path: Path) -> None:
    code = tmp_path / "run" / "code"
    snapshot_code(code)
    (checkout / "modular_lm" / "new.py").write_text("")
    (checkout / "configs" / "debug.yaml").unlink()
    snapshot_code(code)
    assert "modular_lm/new.py" in _files(code)
    assert "configs/debug.yaml" not in _files(code)
    assert [p.name for p in code.parent.iterdir()] == ["code"]


def test_says_commit_and_uncommitted_changes(checkout: Path, tmp_path: Path) -> None:
    code = tmp_path / "run" / "code"
    _git(checkout, "init", "-q")
    _git(checkout, "add", ".")
    _git(checkout, "commit", "-q", "-m", "x")
    commit = _git(checkout, "rev-parse", "HEAD")
    clean = {"version": modular_lm.__version__, "git_commit": commit, "dirty": False}
    assert snapshot_code(code) == clean
    assert json.loads((code / "snapshot.json").read_text()) == clean
    (checkout / "data" / "text.jsonl").write_text("changed, but no code\n")
    assert snapshot_code(code)["dirty"] is False
    (checkout / "modular_lm" / "new.py").write_text("")
    assert snapshot_code(code)["dirty"] is True


def test_a_repository_around_the_checkout_is_not_ours(checkout: Path, tmp_path: Path) -> None:
    _git(tmp_path, "init", "-q")
    _git(tmp_path, "commit", "-q", "--allow-empty", "-m", "x")
    assert snapshot_code(tmp_path / "run" / "code")["git_commit"] is None


def test_the_real_code_is_found(tmp_path: Path) -> None:
    snapshot_code(tmp_path / "code")
    assert "modular_lm/tracking/snapshot.py" in _files(tmp_path / "code")


def test_the_code_that_runs_is_not_replaced_by_itself(
    checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = tmp_path / "run" / "code"
    origin = snapshot_code(code)
    monkeypatch.setattr(modular_lm, "__file__", str(code / "modular_lm" / "__init__.py"))
    before = code.stat()
    assert snapshot_code(code) == origin
    assert (code.stat().st_ino, code.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_a_full_disk_is_named_and_leaves_the_older_snapshot(
    checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = tmp_path / "run" / "code"
    snapshot_code(code)
    before = _files(code)

    def full(source: str, target: str) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), target)

    monkeypatch.setattr(shutil, "copy2", full)
    with pytest.raises(RunFailedError, match="No space left on device"):
        snapshot_code(code)
    assert _files(code) == before
    assert not list(code.parent.glob(".*"))
