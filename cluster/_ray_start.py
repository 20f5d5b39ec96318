"""One node's Ray: its command line, its processes, and its end.

`ray start --block` runs in a session of its own, so that signals which SLURM sends to the steps of
a job do not reach it, and dies with the process that started it, whatever ends that. (That holds
where SLURM signals a step's own processes only: proctrack/pgid, and proctrack/cgroup as it is by
default. With proctrack/linuxproc, or SignalChildrenProcesses=yes in cgroup.conf, Ray gets them too
and may end before a checkpoint.) `ray stop` would end every Ray of the host; here only processes
are ended that carry this node's mark.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

from cluster.plan import JobPlan
from cluster.ports import PortBlock
from modular_lm.errors import RunFailedError
from ray_jobs._sockets import ROOM, excess

MARK = "MODULAR_LM_RAY_NODE"
_OPEN_FILES = 65_536
_PR_SET_PDEATHSIG = 1
# Of Ray's own share of the memory, where SLURM says how much the job has.
_OBJECT_STORE_SHARE = 0.3
# What Ray's commands put before what they say.
_RECORD = re.compile(r"^\S+ \S+ [A-Z]+ \S+ -- ")
_libc = ctypes.CDLL(None)


def check_folder(folder: Path) -> None:
    """Raise RunFailedError if Ray's sockets below `folder` would get too long a path."""
    if excess(folder):
        raise RunFailedError(
            f"{folder}: too long for Ray's sockets, which leave it {ROOM} bytes; "
            "choose a shorter temp_root"
        )


@dataclass(frozen=True)
class RayNode:
    """What one node's Ray is started with.

    head: the address of the first node's Ray (host:port), None on the first node itself.
    mark: tells what this node's Ray started from all other processes of the host.
    """

    name: str
    address: str
    ports: PortBlock
    folder: Path
    head: str | None
    mark: str

    def command(self, plan: JobPlan, memory: int | None) -> list[str]:
        """memory: bytes that the job has on this node, None if SLURM does not limit them."""
        p = self.ports
        first, last = p.workers
        options = {
            "node-ip-address": self.address,
            "node-name": self.name,
            "num-cpus": plan.cpus_per_node,
            "num-gpus": plan.gpus_per_node,
            "temp-dir": self.folder,
            "object-manager-port": p["object_manager"],
            "node-manager-port": p["node_manager"],
            "dashboard-agent-listen-port": p["agent_http"],
            "dashboard-agent-grpc-port": p["agent_grpc"],
            "runtime-env-agent-port": p["runtime_env_agent"],
            "metrics-export-port": p["metrics"],
            "min-worker-port": first,
            "max-worker-port": last,
        }
        if memory is not None:
            store = int(memory * _OBJECT_STORE_SHARE)
            options |= {"object-store-memory": store, "memory": memory - store}
        if self.head is None:
            options |= {
                "port": p["gcs"],
                "dashboard-host": self.address,
                "dashboard-port": p["dashboard"],
                "ray-client-server-port": p["client"],
            }
        else:
            options["address"] = self.head
        shown = [f"--{name}={value}" for name, value in options.items()]
        head = ["--head", "--include-dashboard=true"] if self.head is None else []
        ray = [sys.executable, "-m", "ray.scripts.scripts", "start"]
        quiet = ["--disable-usage-stats", "--log-style=record", "--log-color=false"]
        return [*ray, "--block", *quiet, *head, *shown]

    @property
    def listens_on(self) -> list[int]:
        """Ports that answer when this node's Ray is up."""
        names = ("node_manager",) if self.head else ("gcs", "dashboard", "node_manager")
        return [self.ports[name] for name in names]

    @property
    def output(self) -> Path:
        """What `ray start` prints."""
        return self.folder / "ray_start.log"


def memory_of_job(environment: dict[str, str], plan: JobPlan) -> int | None:
    """Bytes that SLURM gives the job on one node, None if it does not say."""
    if per_node := int(environment.get("SLURM_MEM_PER_NODE", "0")):
        return per_node << 20
    if per_cpu := int(environment.get("SLURM_MEM_PER_CPU", "0")):
        return per_cpu * plan.cpus_per_node << 20
    return None


def start(node: RayNode, plan: JobPlan, environment: dict[str, str]) -> subprocess.Popen:
    """Start this node's Ray; does not wait. To be called from the main thread."""
    with open(node.output, "wb") as output:
        return subprocess.Popen(
            node.command(plan, memory_of_job(environment, plan)),
            env={**environment, MARK: node.mark},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=die_with_parent,
        )


def die_with_parent() -> None:
    """For a new process: SIGKILL when the thread that started it ends."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def raise_open_files() -> None:
    """As many open files as the system allows, up to what Ray asks for."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _OPEN_FILES if hard == resource.RLIM_INFINITY else min(_OPEN_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def is_up(node: RayNode) -> bool:
    """Whether the cluster knows this node and all parts answer that others need."""
    return is_started(node) and all(_answers(node.address, port) for port in node.listens_on)


def trouble(node: RayNode, process: subprocess.Popen) -> str | None:
    """Why this node's Ray is no more, None while it is there."""
    if process.poll() is not None:
        return _ended_parts(node) or (
            f"`ray start` ended ({how(process.returncode)}): {last_words(node.output)}"
        )
    # `ray start --block` goes on without a raylet that ended with 0 or by SIGTERM.
    names = _names_of_children(process)
    if names and "raylet" not in names and is_started(node):
        return "its raylet ended"
    return None


def is_started(node: RayNode) -> bool:
    """Whether `ray start` has said so, which it does when the head knows the node."""
    with contextlib.suppress(OSError):
        return b"Ray runtime started" in node.output.read_bytes()
    return False


def end(process: subprocess.Popen, mark: str, grace_s: float) -> None:
    """End this node's Ray and whatever carries its mark, after `grace_s` seconds by force."""
    deadline = time.monotonic() + grace_s
    if process.poll() is None and grace_s > 0:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(grace_s)
    if process.poll() is None:
        process.kill()
        process.wait()
    # What Ray started dies with it, by itself, but takes a moment.
    left = marked(mark)
    left = psutil.wait_procs(left, timeout=max(0.5, deadline - time.monotonic()))[1]
    for other in left:
        with contextlib.suppress(psutil.Error):
            other.kill()
    psutil.wait_procs(left, timeout=5)


def marked(mark: str) -> list[psutil.Process]:
    """All processes but this one that were started by the Ray with this mark."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get(MARK) == mark and process.pid != os.getpid():
                found.append(process)
    return found


def how(code: int) -> str:
    """An exit code in words."""
    if code >= 0:
        return f"exit code {code}"
    with contextlib.suppress(ValueError):
        return signal.Signals(-code).name
    return f"signal {-code}"


def last_words(file: Path) -> str:
    """The last line of a log that says something, shortened."""
    with contextlib.suppress(OSError), open(file, "rb") as log:
        log.seek(max(0, file.stat().st_size - 8192))
        lines = [" ".join(line.split()) for line in log.read().decode(errors="replace").split("\n")]
        said = [line for line in lines if any(c.isalnum() for c in line)]
        if said:
            return _RECORD.sub("", said[-1])[-300:]
    return "it said nothing"


def _ended_parts(node: RayNode) -> str:
    """The parts of Ray whose end made `ray start` end, if it says so."""
    with contextlib.suppress(OSError):
        found = re.findall(r"(\w+) \[exit code=(-?\d+)", node.output.read_text(errors="replace"))
        return ", ".join(f"its {part} ended ({how(int(code))})" for part, code in found)
    return ""


def _names_of_children(process: subprocess.Popen) -> list[str]:
    names = []
    with contextlib.suppress(psutil.Error):
        for child in psutil.Process(process.pid).children():
            # Ray starts short-lived processes too: one may end in between.
            with contextlib.suppress(psutil.Error):
                names.append(child.name())
    return names


def _answers(address: str, port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection((address, port), timeout=2):
        return True
    return False
