"""A real SLURM of two nodes on this machine, for the tests: munge, slurmctld and two slurmd.

Debian's packages are installed where root may do so; elsewhere these tests skip with the reason.
All files are in a temporary folder, the daemons listen on free ports of loopback, and each node has
a loopback address of its own. Tests that start jobs see to it that none is left when they end
(`Slurm.cancel_all`, `Slurm.processes`).
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import psutil
import pytest

from tests.support import free_ports, wait_until

# node name -> its address
NODES = {"n0": "127.0.0.2", "n1": "127.0.0.3"}
CPUS_PER_NODE = 8
_PACKAGES = ("munge", "slurmctld", "slurmd", "slurm-client")
_COMMANDS = ("munged", "slurmctld", "slurmd", "sbatch")

# `urgent` preempts `main`, with 90 seconds of grace. With the defaults of cred_expire and
# sched_interval a requeued job would wait for minutes. CPUs are only counted.
_CONFIG = """\
ClusterName=loop
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/pgid
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
PreemptType=preempt/partition_prio
PreemptMode=CANCEL
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
SlurmdParameters=config_overrides
SchedulerType=sched/backfill
SchedulerParameters=sched_min_interval=200000,batch_sched_delay=0,bf_interval=1,sched_interval=1
JobRequeue=1
EnforcePartLimits=ALL
MinJobAge=3600
{nodes}
PartitionName=DEFAULT Nodes=ALL MaxTime=1-0 DefaultTime=10
PartitionName=main Default=YES PriorityTier=1 GraceTime=90 PreemptMode=CANCEL
PartitionName=urgent PriorityTier=10 PreemptMode=OFF
"""


@dataclass(frozen=True)
class Slurm:
    """The running SLURM; with `environment` commands find it."""

    folder: Path

    @cached_property
    def environment(self) -> dict[str, str]:
        """This process' environment, without what a job of another SLURM would leave in it."""
        outside = {n: v for n, v in os.environ.items() if not n.startswith(("SLURM", "SBATCH"))}
        return {**outside, "SLURM_CONF": str(self.folder / "slurm.conf")}

    def run(self, *command: str) -> str:
        """What a command, e.g. of SLURM, prints; fails if it fails."""
        done = subprocess.run(
            command, env=self.environment, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, f"{command}: {done.stderr}{done.stdout}"
        return done.stdout

    def state(self, job_id: str) -> str:
        """A job's state (PENDING, RUNNING, COMPLETED, ...); jobs that ended are known as well."""
        return self._field(job_id, "JobState")

    def exit_code(self, job_id: str) -> int:
        """The exit code of a job that ended."""
        return int(self._field(job_id, "ExitCode").partition(":")[0])

    def restarts(self, job_id: str) -> int:
        """How often a job was requeued."""
        return int(self._field(job_id, "Restarts"))

    def _field(self, job_id: str, name: str) -> str:
        shown = self.run("scontrol", "--oneliner", "show", "job", job_id)
        return next(f.partition("=")[2] for f in shown.split() if f.startswith(f"{name}="))

    def wait(self, job_id: str, *states: str, timeout: float = 480) -> str:
        """Wait until the job is in one of these states; returns which."""

        def reached() -> str | None:
            return state if (state := self.state(job_id)) in states else None

        return wait_until(reached, f"job {job_id} to be {' or '.join(states)}", timeout)

    def fail(self, node: str) -> None:
        """The machine of this node is gone without a word, and SLURM finds out."""
        daemon = psutil.Process(int((self.folder / f"slurmd-{node}.pid").read_text()))
        there = [p for p in self.processes() if _environment_of(p).get("SLURMD_NODENAME") == node]
        watchers = {w for p in there for w in p.parents() if w.name() == "slurmstepd"}
        # Those that would tell of it first.
        for process in (daemon, *watchers, *there):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.run("scontrol", "update", f"nodename={node}", "state=down", "reason=test")

    def repair(self, node: str) -> None:
        """The machine is there again."""
        _daemon(self, "slurmd", "-f", self.environment["SLURM_CONF"], "-c", "-N", node)

    def cancel_all(self) -> None:
        """Cancel all jobs and wait until they, and their processes, are gone."""
        self.run("scancel", "--user=root")
        wait_until(lambda: not self.run("squeue", "--noheader").strip(), "cancelled jobs to go", 60)
        wait_until(lambda: not self.processes(), "processes of cancelled jobs to go", 60)

    def processes(self) -> list[psutil.Process]:
        """The processes of jobs and their steps, those that watch over them among them."""
        return [p for p in psutil.process_iter() if self._is_of_a_job(p)]

    def _is_of_a_job(self, process: psutil.Process) -> bool:
        with contextlib.suppress(psutil.Error):
            if process.name() == "slurmstepd":  # has no environment to be known by
                return process.cwd() == str(self.folder)
            environment = process.environ()
            ours = environment.get("SLURM_CONF") == self.environment["SLURM_CONF"]
            return ours and "SLURM_JOB_ID" in environment
        return False


@pytest.fixture(scope="session")
def slurm() -> Iterator[Slurm]:
    """The session's SLURM: partitions `main` and, which preempts it, `urgent`; nodes `NODES`."""
    _require_packages()
    # Short, for sockets; not pytest's, whose path is long.
    folder = Path(tempfile.mkdtemp(prefix="mlm-slurm", dir="/tmp"))
    running = Slurm(folder)
    try:
        _start(running)
        yield running
        running.cancel_all()
    finally:
        left = _stop(folder)
        shutil.rmtree(folder, ignore_errors=True)
    assert not left, f"still running: {left}"


def _require_packages() -> None:
    """Skip unless SLURM is here or can be installed."""
    path = f"{os.environ['PATH']}:/usr/sbin"
    if all(shutil.which(command, path=path) for command in _COMMANDS):
        return
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        pytest.skip(f"needs Debian's packages {' '.join(_PACKAGES)}; installing them needs root")
    install = ["apt-get", "install", "-y", "-qq", "--no-install-recommends", *_PACKAGES]
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for command in (["apt-get", "update", "-qq"], install):
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        if done.returncode:
            pytest.skip(f"{' '.join(command)} failed: {done.stderr.strip()[-300:]}")


def _start(slurm: Slurm) -> None:
    folder = slurm.folder
    controller, *ports = free_ports(1 + len(NODES))
    lines = [
        f"NodeName={name} NodeHostname={socket.gethostname().split('.')[0]} NodeAddr={address} "
        f"Port={port} CPUs={CPUS_PER_NODE} RealMemory=8000 State=UNKNOWN"
        for (name, address), port in zip(NODES.items(), ports, strict=True)
    ]
    (folder / "slurm.conf").write_text(
        _CONFIG.format(
            host=socket.gethostname().split(".")[0],
            controller_port=controller,
            folder=folder,
            nodes="\n".join(lines),
        )
    )
    key = folder / "munge.key"
    key.touch(mode=0o400)
    key.write_bytes(secrets.token_bytes(1024))
    files = {
        "key-file": key,
        "socket": folder / "munge.socket",
        "pid-file": folder / "munged.pid",
        "log-file": folder / "munged.log",
        "seed-file": folder / "munge.seed",
    }
    _daemon(slurm, "munged", "--force", *(f"--{name}={file}" for name, file in files.items()))
    config = ("-f", slurm.environment["SLURM_CONF"], "-c")
    _daemon(slurm, "slurmctld", *config, "-i")
    for name in NODES:
        _daemon(slurm, "slurmd", *config, "-N", name)
    wait_until(lambda: _idle(slurm), f"the nodes of SLURM, see {folder}", 60)


def _daemon(slurm: Slurm, name: str, *args: str) -> None:
    path = f"{slurm.environment['PATH']}:/usr/sbin"
    command = shutil.which(name, path=path)
    assert command is not None
    # They detach when they are ready.
    done = subprocess.run(
        [command, *args],
        env=slurm.environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        timeout=60,
    )
    logs = sorted(slurm.folder.glob("*.log"))
    assert done.returncode == 0, f"{name}: " + "".join(log.read_text()[-1000:] for log in logs)


def _idle(slurm: Slurm) -> bool:
    shown = subprocess.run(
        ["sinfo", "--noheader", "--partition=main", "--format=%T %D"],
        env=slurm.environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    return shown.stdout.split() == ["idle", str(len(NODES))]


def _stop(folder: Path) -> list[psutil.Process]:
    """End the daemons, by the ids that they wrote; returns what still runs after that."""
    order = [*folder.glob("slurmd-*.pid"), folder / "slurmctld.pid", folder / "munged.pid"]
    daemons = []
    for file in order:
        if file.is_file() and psutil.pid_exists(number := int(file.read_text())):
            daemon = psutil.Process(number)
            daemon.send_signal(signal.SIGTERM)
            daemons.append(daemon)
    _, stuck = psutil.wait_procs(daemons, timeout=20)
    for daemon in stuck:
        daemon.kill()
    return [p for p in psutil.process_iter() if _belongs_to(p, folder)]


def _environment_of(process: psutil.Process) -> dict[str, str]:
    with contextlib.suppress(psutil.Error):
        return process.environ()
    return {}


def _belongs_to(process: psutil.Process, folder: Path) -> bool:
    with contextlib.suppress(psutil.Error):
        if process.status() != psutil.STATUS_ZOMBIE:
            configured = process.environ().get("SLURM_CONF") == str(folder / "slurm.conf")
            return configured or process.cwd() == str(folder)
    return False
