"""A node dies with the blocks it held: the stream goes on with the same rows."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator

import numpy as np
import psutil
import pytest

from tests.ray_jobs.feed import BATCH, feed, small_stream
from tests.support import end, reading_tasks, wait_until

STEPS = 40_000
pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(400)]


@pytest.fixture
def second_node(ray_head: dict[str, str]) -> Iterator[subprocess.Popen]:
    """Another node in the session's Ray, under an address of its own."""
    import ray

    before = len(alive_nodes())
    with tempfile.TemporaryDirectory(prefix="mlm2", dir="/tmp") as short:
        node = subprocess.Popen(
            [
                *(sys.executable, "-m", "ray.scripts.scripts", "start", "--block"),
                *(f"--address={ray_head['RAY_ADDRESS']}", "--node-ip-address=127.0.0.2"),
                *("--num-cpus=2", "--object-store-memory=100000000", f"--temp-dir={short}"),
            ],
            env={k: v for k, v in ray_head.items() if k != "RAY_ADDRESS"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            wait_until(lambda: len(alive_nodes()) > before, "the second node", 120)
            assert ray.is_initialized()
            yield node
        finally:
            end(node)


def alive_nodes() -> list[str]:
    import ray

    return [node["NodeID"] for node in ray.nodes() if node["Alive"]]


def newest_node() -> str:
    import ray

    (found,) = [n for n in ray.nodes() if n["Alive"] and n["NodeManagerAddress"] == "127.0.0.2"]
    return found["NodeID"]


def raylet_of(node: subprocess.Popen) -> psutil.Process:
    (found,) = [p for p in psutil.Process(node.pid).children() if "raylet" in p.name()]
    return found


def reads_under(raylet: psutil.Process, environment: dict[str, str]) -> bool:
    children = {process.pid for process in raylet.children()}
    return any(process.pid in children for process in reading_tasks(environment))


def test_blocks_of_a_node_that_died_are_read_again(
    ray_session_joined: None,
    ray_head: dict[str, str],
    second_node: subprocess.Popen,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from ray.data import DataContext
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    from ray_jobs._ingest import ReadAhead

    there = NodeAffinitySchedulingStrategy(newest_node(), soft=True)
    for name in ("scheduling_strategy", "scheduling_strategy_large_args"):
        monkeypatch.setattr(DataContext.get_current(), name, there)

    # Deliveries too large to travel inside messages: they lie in the object store of their node.
    stream = dataclasses.replace(
        small_stream(0, STEPS, 1), steps_per_delivery=200, deliveries_per_segment=8
    )
    raylet = raylet_of(second_node)
    received, enough = [], STEPS
    with contextlib.closing(ReadAhead(feed(), stream, 0)) as steps:
        for rows in steps:
            received.append(rows)
            if enough == STEPS and len(received) % 200 == 1 and reads_under(raylet, ray_head):
                os.kill(raylet.pid, signal.SIGKILL)
                enough = len(received) + 5_000
            if len(received) == enough:
                break
    assert enough < STEPS, "no segment was read on the second node"
    assert [rows.step for rows in received] == list(range(enough))
    tokens = np.concatenate([rows.tokens for rows in received])
    assert np.array_equal(tokens, feed().read(np.arange(enough * BATCH)))
