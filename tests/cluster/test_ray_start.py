"""A node's Ray: what it is asked for, and processes that end with their parent or by their mark."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from cluster import _ray_start
from cluster._ray_start import MARK, RayNode
from cluster.plan import JobPlan
from cluster.ports import PortBlock, block_size
from modular_lm.errors import RunFailedError
from tests.support import wait_until

PLAN = JobPlan("ray_jobs.train", [], "/run", "/code", nodes=2, cpus_per_node=3, gpus_per_node=1)
SLEEP = [sys.executable, "-c", "import time; time.sleep(600)"]
pytestmark = pytest.mark.timeout(120)


def node(head: str | None, folder: str = "/tmp/mlm12-n0-abcdefgh") -> RayNode:
    block = PortBlock(20000, block_size(PLAN.cpus_per_node))
    return RayNode("n0", "127.0.0.2", block, Path(folder), head, "12-0 n0")


@pytest.mark.parametrize("head", [None, "127.0.0.2:20001"])
def test_ray_understands_every_option_and_no_port_is_left_to_chance(head: str | None) -> None:
    from ray.scripts.scripts import start

    command = node(head).command(PLAN, 1000 << 20)
    given = start.make_context("start", command[command.index("start") + 1 :]).params
    assert (given["num_cpus"], given["num_gpus"]) == (3, 1)
    assert given["memory"] + given["object_store_memory"] == 1000 << 20
    assert given["node_ip_address"] == "127.0.0.2"
    ports = {name: given[name] for name in given if name.endswith("_port") and "redis" not in name}
    only_head = {"port", "dashboard_port", "ray_client_server_port"}
    expected = {n for n in ports if n not in only_head} if head else set(ports)
    assert {name for name in expected if ports[name] is None} == set()
    assert len({ports[name] for name in expected}) == len(expected)
    if head is None:
        from ray._private.parameter import RayParams

        RayParams(ray_client_server_port=given["ray_client_server_port"])


def test_a_folder_too_long_for_sockets_is_refused() -> None:
    _ray_start.check_folder(node(None).folder)
    with pytest.raises(RunFailedError, match="choose a shorter temp_root"):
        _ray_start.check_folder(Path("/scratch/with/a/rather/long/name/mlm1234567-n0-abcdefgh"))


def test_memory_is_what_slurm_gives() -> None:
    assert _ray_start.memory_of_job({"SLURM_MEM_PER_NODE": "64"}, PLAN) == 64 << 20
    assert _ray_start.memory_of_job({"SLURM_MEM_PER_CPU": "10"}, PLAN) == 30 << 20
    assert _ray_start.memory_of_job({}, PLAN) is None


def test_all_that_carries_the_mark_is_ended_and_nothing_else() -> None:
    mark = f"test {os.getpid()} n0"
    marked = {**os.environ, MARK: mark}
    ours = subprocess.Popen(SLEEP, env=marked)
    # As a worker of Ray would be: it ignores SIGTERM, and is no child of what is ended.
    stubborn = subprocess.Popen(
        [sys.executable, "-c", "import signal, time; signal.signal(15, 1); time.sleep(600)"],
        env=marked,
    )
    other = subprocess.Popen(SLEEP, env={**os.environ, MARK: f"{mark}0"})
    try:
        wait_until(lambda: len(_ray_start.marked(mark)) == 2, "both", 20)
        _ray_start.end(ours, mark, 0.5)
        assert ours.wait(10) == -signal.SIGTERM
        assert not psutil.pid_exists(stubborn.pid)
        assert _ray_start.marked(mark) == []
        assert other.poll() is None
    finally:
        for process in (ours, stubborn, other):
            process.kill()
            process.wait()


def test_a_process_dies_with_the_one_that_started_it() -> None:
    code = (
        "import subprocess, sys; from cluster._ray_start import die_with_parent; "
        f"p = subprocess.Popen({SLEEP!r}, preexec_fn=die_with_parent, start_new_session=True); "
        "print(p.pid, flush=True); p.wait()"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = psutil.Process(int(parent.stdout.readline()))
    parent.kill()
    parent.wait()
    psutil.wait_procs([child], timeout=20)
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE


def test_trouble_says_why(tmp_path: Path) -> None:
    started = node(None, str(tmp_path))
    started.output.write_text("Ray runtime started.\n")
    gone = subprocess.Popen([sys.executable, "-c", "raise SystemExit(7)"])
    gone.wait()
    started.output.write_text("one\nPort 20001 is in use\n----\n")
    assert _ray_start.trouble(started, gone) == (
        "`ray start` ended (exit code 7): Port 20001 is in use"
    )
    # As Ray writes it when a raylet was killed.
    started.output.write_text(
        "2026-11-29 14:00:24,974 ERR scripts.py:1307 -- Some Ray subprocesses exited:\n"
        "2026-11-29 14:00:24,974 ERR scripts.py:87 -- raylet [exit code=-9]\n"
        "2026-11-29 14:00:24,975 ERR scripts.py:1315 -- Remaining processes will be killed.\n"
    )
    assert _ray_start.trouble(started, gone) == "its raylet ended (SIGKILL)"
    assert _ray_start.last_words(started.output) == "Remaining processes will be killed."
    # `ray start` is there and has said that it started, but its raylet is not among its children.
    code = "import subprocess, sys, time; subprocess.Popen(['sleep', '600']); time.sleep(600)"
    blocked = subprocess.Popen([sys.executable, "-c", code])
    try:
        wait_until(lambda: psutil.Process(blocked.pid).children(), "a child", 20)
        started.output.write_text("Local node IP: 127.0.0.2\n")
        assert _ray_start.trouble(started, blocked) is None
        started.output.write_text("Ray runtime started.\n")
        assert _ray_start.trouble(started, blocked) == "its raylet ended"
    finally:
        for process in [*psutil.Process(blocked.pid).children(), blocked]:
            process.kill()
        blocked.wait()


def test_a_child_that_ends_while_it_is_asked_is_no_trouble(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = node(None, str(tmp_path))
    started.output.write_text("Ray runtime started.\n")
    gone = subprocess.Popen(SLEEP)
    children = [psutil.Process(gone.pid)]
    gone.kill()
    gone.wait()
    monkeypatch.setattr(psutil.Process, "children", lambda self: children)
    blocked = subprocess.Popen(SLEEP)
    try:
        assert _ray_start.trouble(started, blocked) is None
    finally:
        blocked.kill()
        blocked.wait()


def test_last_words_of_nothing(tmp_path: Path) -> None:
    assert _ray_start.last_words(tmp_path / "none") == "it said nothing"
    assert _ray_start.how(-9) == "SIGKILL"
