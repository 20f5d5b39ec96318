"""What the first node makes of what the others, and srun, say."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster._nodes import NodeGroup
from cluster._shared_files import SharedFiles
from cluster.plan import JobPlan
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
    assert "3 of 4 nodes did not come" in message
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
