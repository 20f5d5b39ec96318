"""What the first node makes of what the others, and srun, say."""

from __future__ import annotations

import contextlib
import functools
import queue
import subprocess
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from cluster import _control, _nodes
from cluster._control import Nodes as Wire
from cluster._nodes import Node, NodeGroup
from cluster._shared_files import SharedFiles
from cluster.plan import JobPlan
from cluster.ports import PortBlock
from cluster.scheduler import Allocation
from modular_lm.errors import RunFailedError

NAMES = ("n0", "n1", "n2", "n3")


def group(folder: Path, enough: int = 0) -> NodeGroup:
    plan = JobPlan("s", [], str(folder), "", nodes=4, cpus_per_node=2, min_nodes=enough)
    allocation = Allocation("5", 0, NAMES)
    return NodeGroup(plan, allocation, SharedFiles(folder, "5-0"), folder / "nodes.log")


def say(nodes: NodeGroup, name: str, kind: str, **fields: object) -> str | None:
    lost = nodes.on_message(name, {"kind": kind, **fields})
    return None if lost is None else lost.name


def come(nodes: NodeGroup, name: str) -> None:
    say(nodes, name, "hello", address=f"10.0.0.{name[1]}", host=name, word="w")


def test_a_node_that_was_up_is_lost_once(tmp_path: Path) -> None:
    nodes = group(tmp_path)
    come(nodes, "n1")
    assert nodes.nodes["n1"].address == "10.0.0.1"
    assert say(nodes, "n1", "ready") is None
    assert say(nodes, "n1", "lost", why="its raylet ended") == "n1"
    assert say(nodes, "n1", "gone") is None
    assert nodes.nodes["n1"].why == "its raylet ended"


def test_a_node_that_stopped_as_asked_is_not_lost(tmp_path: Path) -> None:
    nodes = group(tmp_path)
    come(nodes, "n1")
    say(nodes, "n1", "ready")
    say(nodes, "n1", "stopped")
    assert say(nodes, "n1", "gone") is None
    assert nodes.nodes["n1"].state == "stopped"


SAID = """\
0: python: all is well
2: Traceback (most recent call last):
2: ModuleNotFoundError: No module named 'cluster'
srun: error: n2: task 2: Exited with exit code 1
3: error: dump_dir: n3 does not see what the first node wrote
srun: error: n[1,3]: tasks 1,3: Exited with exit code 2
"""


def test_nodes_that_do_not_come_are_named_with_their_last_words(tmp_path: Path) -> None:
    nodes = group(tmp_path)
    (tmp_path / "nodes.log").write_text(SAID)
    assert sorted(nodes._ended_tasks()) == ["n1", "n2", "n3"]
    come(nodes, "n0")
    with pytest.raises(RunFailedError) as raised:
        nodes._check_enough("here")
    message = str(raised.value)
    assert "3 of 4 nodes did not come, after 0 s" in message
    assert "n1: error: n[1,3]: tasks 1,3: Exited with exit code 2" in message
    assert "n2: ModuleNotFoundError: No module named 'cluster'" in message
    assert "n3: error: dump_dir: n3 does not see what the first node wrote" in message
    assert "n0:" not in message
    assert "\n" not in message


def test_enough_nodes_start_without_the_others_but_never_without_the_first(tmp_path: Path) -> None:
    nodes = group(tmp_path, enough=2)
    come(nodes, "n1")
    come(nodes, "n2")
    with pytest.raises(RunFailedError, match="2 of 4 nodes did not come"):
        nodes._check_enough("here")
    nodes = group(tmp_path, enough=2)
    for name in ("n0", "n2"):
        come(nodes, name)
    nodes._check_enough("here")
    assert [node.state for node in nodes.nodes.values()] == ["here", "lost", "here", "lost"]


@pytest.mark.timeout(60)
def test_ray_that_ends_while_it_starts_is_started_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_nodes, "_PAUSE_S", 0.01)
    answers = {"n1": ["lost", "ready"], "n2": ["ready"], "n3": ["lost", "lost", "lost"]}
    started = started_with(tmp_path, answers)
    assert {node.name: node.state for node in started} == {"n1": "up", "n2": "up", "n3": "lost"}
    assert started[-1].why == "its raylet ended"


@pytest.mark.timeout(60)
def test_ray_that_takes_its_time_to_end_is_started_until_the_deadline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a machine that is busy for minutes; no end here counts as a quick one."""
    monkeypatch.setattr(_nodes, "_PAUSE_S", 0.01)
    monkeypatch.setattr(_nodes, "_QUICK_S", 0.0)
    answers = {"n1": ["lost"] * 9 + ["ready"], "n2": ["ready"], "n3": ["ready"]}
    assert [node.state for node in started_with(tmp_path, answers)] == ["up"] * 3
    (tmp_path / "again").mkdir()
    answers["n1"] = ["lost"] * 500
    monkeypatch.setattr(_nodes, "_PAUSE_S", 0.1)
    first, *others = started_with(tmp_path / "again", answers, seconds=2)
    assert first.state in ("lost", "starting")
    assert [node.state for node in others] == ["up", "up"]


def started_with(folder: Path, answers: dict[str, list[str]], seconds: float = 30) -> list[Node]:
    """Ray started over a real wire, on nodes that answer as the script says."""
    nodes = group(folder, enough=2)
    heard: queue.Queue = queue.Queue()
    nodes._wire = Wire(b"key", lambda name, message: heard.put((name, message)))
    nodes._srun = subprocess.Popen(["sleep", "60"])
    come(nodes, "n0")
    nodes.head.block = PortBlock(20000, 60)
    for name, script in answers.items():
        threading.Thread(target=answer, args=(nodes._wire.port, name, script), daemon=True).start()
    pump = functools.partial(pump_from, nodes, heard)
    try:
        while len(nodes._in("here")) < 4:
            pump(1)
        started = [nodes.nodes[name] for name in answers]
        nodes._start(started, "10.0.0.0:20001", time.monotonic() + seconds, pump)
    finally:
        nodes._srun.kill()
        nodes._srun.wait()
        nodes._wire.close()
    return started


def test_nodes_that_only_waited_for_the_first_are_not_blamed(tmp_path: Path) -> None:
    nodes = group(tmp_path)
    (tmp_path / "nodes.log").write_text("srun: error: lacks support for cpu binding\n")
    for name in NAMES:
        come(nodes, name)
        say(nodes, name, "claimed", taken=[])
    nodes.head.state = "starting"
    say(nodes, "n0", "lost", why="`ray start` ended (exit code 1): no GCS")
    with pytest.raises(RunFailedError) as raised:
        nodes._check_enough("up")
    message = str(raised.value)
    assert "1 of 4 nodes did not come, after 0 s: n0: `ray start` ended (exit code 1)" in message
    assert "; n1, n2, n3 waited for n0 (log:" in message
    assert "binding" not in message


def test_a_ray_that_still_starts_at_the_deadline_says_so(tmp_path: Path) -> None:
    nodes = group(tmp_path)
    come(nodes, "n0")
    nodes.head.state, nodes.head.asked = "starting", time.monotonic() - 7
    with pytest.raises(RunFailedError, match="n0: its Ray was not up 7 s after its start"):
        nodes._check_enough("up")


@pytest.mark.timeout(60)
def test_nodes_that_never_come_take_no_time_from_ray_and_are_not_waited_for(tmp_path: Path) -> None:
    nodes = group(tmp_path, enough=2)
    nodes._plan = replace(nodes._plan, start_timeout_s=1)
    nodes._shared.create()
    heard: queue.Queue = queue.Queue()
    nodes._wire = Wire(b"key", lambda name, message: heard.put((name, message)))
    nodes._srun = subprocess.Popen(["sleep", "60"])
    for name in ("n0", "n1"):
        word = nodes._shared.answer(name)
        threading.Thread(target=obey, args=(nodes._wire.port, name, word), daemon=True).start()
    pump = functools.partial(pump_from, nodes, heard)
    try:
        nodes.bring_up(pump)
    finally:
        nodes._srun.kill()
        nodes._srun.wait()
    assert [node.state for node in nodes.nodes.values()] == ["up", "up", "lost", "lost"]
    began = time.monotonic()
    nodes.take_down(30, pump)
    assert time.monotonic() - began < 5


def obey(port: int, name: str, word: str) -> None:
    """A node that does what it is asked; its Ray takes a moment."""
    connection = _control.connect("127.0.0.1", port, b"key")
    hello = {"kind": "hello", "node": name, "address": "10.0.0.9", "host": name, "word": word}
    _control.send(connection, hello)
    kind = ""
    while kind != "stop":
        kind = _control.receive(connection)["kind"]
        time.sleep(0.3 if kind == "start" else 0)
        said = {"claim": "claimed", "start": "ready", "stop": "stopped"}[kind]
        _control.send(connection, {"kind": said, "taken": []})


def answer(port: int, name: str, script: list[str]) -> None:
    connection = _control.connect("127.0.0.1", port, b"key")
    hello = {"kind": "hello", "node": name, "address": "10.0.0.9", "host": name, "word": "w"}
    _control.send(connection, hello)
    with contextlib.suppress(EOFError, OSError):  # until the wire is closed
        for kind in script:
            assert _control.receive(connection)["kind"] == "start"
            _control.send(connection, {"kind": kind, "why": "its raylet ended"})
        _control.receive(connection)


def pump_from(nodes: NodeGroup, heard: queue.Queue, seconds: float) -> None:
    with contextlib.suppress(queue.Empty):
        nodes.on_message(*heard.get(timeout=seconds))
