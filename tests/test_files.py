"""Files are replaced as a whole, and a lock has one holder, however processes end."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from modular_lm.errors import RunFailedError
from modular_lm.files import Locked, lock, write_text_atomic

# ------------------------------------------------------------------ replacing


def test_a_file_is_replaced(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    write_text_atomic(file, "name: ä\n")
    write_text_atomic(file, "name: ö\n")
    assert file.read_text(encoding="utf-8") == "name: ö\n"
    assert file.stat().st_mode & 0o777 == 0o666 & ~_umask()
    assert [p.name for p in tmp_path.iterdir()] == ["config.yaml"]


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_an_interrupted_replacement_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "config.yaml"
    write_text_atomic(file, "old")

    def crash(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(KeyboardInterrupt):
        write_text_atomic(file, "new")
    assert file.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["config.yaml"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_names_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    def over_quota(*_: object) -> int:
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    monkeypatch.setattr(os, call, over_quota)
    with pytest.raises(RunFailedError, match=r"config\.yaml: Disk quota exceeded; free"):
        write_text_atomic(tmp_path / "config.yaml", "name: x\n")
    assert list(tmp_path.iterdir()) == []


def test_content_is_durable_before_the_name_and_the_name_before_the_return(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = []
    fsync, replace = os.fsync, os.replace

    def watched_fsync(handle: int) -> None:
        done.append("folder" if os.path.isdir(f"/proc/self/fd/{handle}") else "file")
        fsync(handle)

    def watched_replace(*names: Any) -> None:
        done.append("rename")
        replace(*names)

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(os, "replace", watched_replace)
    write_text_atomic(tmp_path / "x", "x")
    assert done == ["file", "rename", "folder"]


# ------------------------------------------------------------------ locking

HOLD = """
import sys, time
from pathlib import Path
from modular_lm.files import lock
with lock(Path(sys.argv[1])):
    print("holds", flush=True)
    time.sleep(60)
"""


def test_a_second_holder_is_refused_and_told_of_the_first(tmp_path: Path) -> None:
    path = tmp_path / "new" / "lock"
    with lock(path, blocking=False):
        with pytest.raises(Locked) as caught, lock(path, blocking=False):
            pytest.fail("two holders")
        assert caught.value.holder == f"process {os.getpid()} on {socket.gethostname()}"
        assert path.read_text() == caught.value.holder
    assert list(path.parent.iterdir()) == []
    with lock(path, blocking=False):
        pass


def test_a_failure_gives_the_lock_back(tmp_path: Path) -> None:
    with pytest.raises(KeyError), lock(tmp_path / "lock"):
        raise KeyError
    with lock(tmp_path / "lock", blocking=False):
        pass


def test_a_killed_holder_holds_nothing(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "holds\n"
        with pytest.raises(Locked, match=f"process {holder.pid} on"), lock(path, blocking=False):
            pytest.fail("two holders")
        holder.send_signal(signal.SIGKILL)
    assert path.exists()
    with lock(path, blocking=False):
        assert path.read_text().startswith(f"process {os.getpid()} on")


def test_waiting_holders_come_one_at_a_time(tmp_path: Path) -> None:
    """Each holder removes the file, on which others wait: they must all find the new one."""
    path = tmp_path / "lock"
    inside, most, total = 0, 0, 0

    def work() -> None:
        nonlocal inside, most, total
        for _ in range(20):
            with lock(path):
                inside += 1
                most = max(most, inside)
                time.sleep(0.0005)
                total += 1
                inside -= 1

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert (most, total) == (1, 120)
    assert list(tmp_path.iterdir()) == []


def test_a_file_system_without_locks_is_warned_of_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def unsupported(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", unsupported)
    done = False
    with lock(tmp_path / "lock", blocking=False):
        done = True
    assert done
    assert [r.levelname for r in caplog.records] == ["WARNING"]
    assert "this file system has no locks" in caplog.text


def test_another_trouble_with_the_lock_is_not_hidden(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(fcntl, "flock", broken)
    with pytest.raises(OSError, match="Input/output error"), lock(tmp_path / "lock"):
        pytest.fail("not held")
