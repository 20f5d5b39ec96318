"""The wire between the allocation and its nodes, the shared folder, the logs brought back."""

from __future__ import annotations

import queue
import stat
import threading
from multiprocessing import AuthenticationError
from pathlib import Path

import pytest

from cluster import _control, _shared_files
from cluster._control import Nodes
from cluster._ray_logs import save_logs
from cluster._shared_files import SharedFiles
from modular_lm.errors import ConfigError

SECRET = b"0123456789abcdef"
pytestmark = pytest.mark.timeout(60)


def test_messages_go_both_ways_and_a_node_that_goes_is_noticed() -> None:
    heard: queue.Queue = queue.Queue()
    nodes = Nodes(SECRET, lambda node, message: heard.put((node, message)))
    one = _control.connect("127.0.0.1", nodes.port, SECRET)
    _control.send(one, {"kind": "hello", "node": "n1"})
    assert heard.get(timeout=10) == ("n1", {"kind": "hello", "node": "n1"})
    nodes.send("n1", {"kind": "start", "head": None})
    assert _control.receive(one) == {"kind": "start", "head": None}
    one.close()
    assert heard.get(timeout=10) == ("n1", {"kind": "gone"})
    nodes.send("n1", {"kind": "stop"})
    nodes.send("never seen", {"kind": "stop"})
    nodes.close()


def test_a_node_learns_that_the_allocation_is_gone() -> None:
    heard: queue.Queue = queue.Queue()
    nodes = Nodes(SECRET, lambda node, message: heard.put(node))
    one = _control.connect("127.0.0.1", nodes.port, SECRET)
    _control.send(one, {"kind": "hello", "node": "n1"})
    heard.get(timeout=10)
    nodes.close()
    with pytest.raises((EOFError, OSError)):
        _control.receive(one)
    with pytest.raises(ConnectionRefusedError):
        _control.connect("127.0.0.1", nodes.port, SECRET)


def test_a_stranger_is_not_heard() -> None:
    heard: queue.Queue = queue.Queue()
    nodes = Nodes(SECRET, lambda node, message: heard.put(node))
    with pytest.raises((AuthenticationError, EOFError, OSError)):
        _control.connect("127.0.0.1", nodes.port, b"a guess")
    friend = _control.connect("127.0.0.1", nodes.port, SECRET)
    _control.send(friend, {"kind": "hello", "node": "n1"})
    assert heard.get(timeout=10) == "n1"
    assert heard.empty()
    nodes.close()


def test_the_secret_is_for_its_owner_only_and_new_at_every_start(tmp_path: Path) -> None:
    first = SharedFiles(tmp_path, "12-0")
    first.create()
    assert stat.S_IMODE(first.token.stat().st_mode) == 0o600
    assert stat.S_IMODE(first.folder.stat().st_mode) == 0o700
    secret = first.secret
    other = SharedFiles(tmp_path, "1-0")
    other.create()
    again = SharedFiles(tmp_path, "12-1")
    again.create()
    assert again.secret != secret
    assert len(again.secret) == 64
    # What the start before left is gone, another job's folder is not.
    assert not first.folder.exists()
    assert other.folder.exists()
    again.remove()
    assert not again.folder.exists()


def test_a_folder_that_is_not_shared_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_shared_files, "_PATIENCE_S", 0.5)
    here, there = SharedFiles(tmp_path / "a", "1-0"), SharedFiles(tmp_path / "b", "1-0")
    here.create()
    there.create()
    here.check_answer("n0", here.answer("n0"))
    with pytest.raises(ConfigError, match=r"what n1 writes .* must be on a file system that all"):
        here.check_answer("n1", there.answer("n1"))


def test_what_arrives_late_is_waited_for(tmp_path: Path) -> None:
    shared = SharedFiles(tmp_path, "1-0")
    shared.create()
    shared.answer("n0")
    late = threading.Timer(0.5, lambda: (shared.folder / "word-n0").write_text("late"))
    late.start()
    shared.check_answer("n0", "late")


def test_logs_are_brought_back_within_bounds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logs = tmp_path / "mlm1" / "session_2026-11-29_12-00-00_1_2" / "logs"
    (logs / "old").mkdir(parents=True)
    (logs / "raylet.out").write_bytes(b"x" * (5 << 20) + b"end")
    (logs / "old" / "empty.log").touch()
    (logs / "old" / "worker.err").write_text("why")
    (tmp_path / "mlm1" / "ray_start.log").write_text("Ray runtime started")
    (tmp_path / "mlm1" / "session_latest").symlink_to(logs.parent)
    saved = tmp_path / "run" / "n0"
    assert save_logs(tmp_path / "mlm1", saved) == (4 << 20) + 3 + 19
    files = {str(f.relative_to(saved)) for f in saved.rglob("*") if f.is_file()}
    assert files == {"raylet.out", "old/worker.err", "ray_start.log"}
    assert (saved / "raylet.out").read_bytes().endswith(b"xend")
    assert save_logs(tmp_path / "none", tmp_path / "nothing") == 0
    assert not (tmp_path / "nothing").exists()
