"""A node's own process: what the system refuses it, and what it leaves on its disk."""

from __future__ import annotations

import errno
import os
import threading
from multiprocessing import Pipe
from pathlib import Path

import pytest

from cluster import _control, _ray_start, node
from cluster.node import _expanded, _Node, _own_folder
from cluster.plan import JobPlan
from modular_lm.errors import ConfigError, RunFailedError


@pytest.mark.timeout(60)
def test_a_full_disk_is_told_and_is_not_the_end_of_the_wire(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/tmp/ray_start.log")

    monkeypatch.setattr(node, "node_address", lambda _: "127.0.0.1")
    monkeypatch.setattr(_ray_start, "start", refuse)
    plan = JobPlan("s", [], str(tmp_path / "run"), "", nodes=1, cpus_per_node=1)
    ours, its = Pipe()
    served = _Node(plan, "n0", "7-0", tmp_path, its, [])
    thread = threading.Thread(target=served.serve, args=("word",))
    thread.start()
    assert _control.receive(ours)["word"] == "word"
    _control.send(ours, {"kind": "claim", "first": 23000, "size": 60})
    assert _control.receive(ours)["kind"] == "claimed"
    for _ in range(2):
        _control.send(ours, {"kind": "start", "head": None, "dashboard": ""})
        lost = {"kind": "lost", "why": "/tmp/ray_start.log: No space left on device"}
        assert _control.receive(ours) == lost
    _control.send(ours, {"kind": "stop", "grace_s": 0})
    assert _control.receive(ours) == {"kind": "stopped"}
    thread.join(10)
    assert not thread.is_alive()


@pytest.mark.timeout(60)
def test_a_node_ends_when_the_wire_is_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(node, "node_address", lambda _: "127.0.0.1")
    plan = JobPlan("s", [], str(tmp_path / "run"), "", nodes=1, cpus_per_node=1)
    ours, its = Pipe()
    ours.close()
    _Node(plan, "n0", "7-0", tmp_path, its, []).serve("word")
    assert "n0: the allocation is gone" in capsys.readouterr().out


def test_a_folder_for_ray_may_be_named_by_a_variable_of_the_node(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("LOCAL", "/scratch/7")
    assert _expanded("$LOCAL/ray", "n0") == "/scratch/7/ray"
    for temp_root, shown in (("$NOPE/x", r"\$NOPE/x"), ("${LOCAL", r"\$\{LOCAL"), ("x", "x")):
        with pytest.raises(ConfigError, match=f"on n0: is {shown}, no absolute path"):
            _expanded(temp_root, "n0")


def test_a_folder_that_cannot_be_used_is_not_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_ray_start, "check_folder", lambda _: None)
    monkeypatch.setattr(node, "_OWNER", "no/such/folder")
    with pytest.raises(RunFailedError, match=r"^temp_root=.* on n0: .*No such file"):
        _own_folder(str(tmp_path), "7-0", "n0")
    assert list(tmp_path.iterdir()) == []
