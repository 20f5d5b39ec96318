"""What SLURM says of the job that this process belongs to, and what is asked of it.

The launcher's side (sbatch) is not here. Commands of SLURM are run as they are on the PATH; a
controller that does not answer is an unknown answer, never a reason to end a job.
"""

from __future__ import annotations

import ipaddress
import logging
import os
import re
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime

from modular_lm.errors import ConfigError, RunFailedError

log = logging.getLogger(__name__)

_TIMEOUT_S = 20.0
# When a signal has come there is little time.
_STATUS_TIMEOUT_S = 5.0
_DEFAULT_KILL_WAIT_S = 30.0
# States in which a start of a job is over, or has what is left of its processes ended. All others
# go on: SLURM shows SIGNALING, for one, while any signal to a running job is under way.
_ENDING = (
    *("COMPLETING", "COMPLETED", "CANCELLED", "FAILED", "TIMEOUT", "PREEMPTED", "NODE_FAIL"),
    *("BOOT_FAIL", "DEADLINE", "OUT_OF_MEMORY", "REVOKED", "LAUNCH_FAILED", "STAGE_OUT"),
    *("PENDING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "SPECIAL_EXIT", "RESV_DEL_HOLD"),
)


@dataclass(frozen=True)
class Allocation:
    """The job whose process this is.

    job: how SLURM's commands name this job and no other: "123", for a task of an array "120_3";
    restarts: how often it was requeued; nodes: first the one that runs the batch script.
    """

    job: str
    restarts: int
    nodes: tuple[str, ...]

    @property
    def attempt(self) -> str:
        """A name for this start of this job, short enough for paths."""
        return f"{self.job}-{self.restarts}"

    def __str__(self) -> str:
        return f"SLURM job {self.job}"


def this_allocation(environment: Mapping[str, str] = os.environ) -> Allocation:
    """The allocation that the environment describes. Raises ConfigError outside of one."""
    if "SLURM_JOB_ID" not in environment:
        raise ConfigError(
            "SLURM_JOB_ID is not set: this runs inside a SLURM job; submit one, or use salloc"
        )
    job = environment["SLURM_JOB_ID"]
    if "SLURM_ARRAY_JOB_ID" in environment:
        # The last task has the array's own number, by which commands would mean all tasks.
        job = f"{environment['SLURM_ARRAY_JOB_ID']}_{environment['SLURM_ARRAY_TASK_ID']}"
    nodes = hostnames(environment["SLURM_JOB_NODELIST"])
    return Allocation(job, int(environment.get("SLURM_RESTART_COUNT", "0")), tuple(nodes))


def hostnames(node_list: str) -> list[str]:
    """The nodes that SLURM writes as n[0-3]. Raises RunFailedError."""
    return _run("scontrol", "show", "hostnames", node_list).split()


def number_of(allocation: Allocation) -> int:
    """A number that no other job has for a long time: neighbours have neighbouring ones."""
    first, _, task = allocation.job.partition("_")
    return int(first) + int(task or 0)


@dataclass(frozen=True)
class JobStatus:
    """state: RUNNING, COMPLETING, ...; preempted: within the grace time of a preemption; ends_in:
    seconds until SLURM ends the job, None if it does not say; restarts, node_list: as they are now;
    is_batch: whether it has a batch script."""

    state: str
    preempted: bool
    ends_in: float | None
    restarts: int = 0
    node_list: str = ""
    is_batch: bool = False

    @property
    def is_ending(self) -> bool:
        """Whether SLURM ends this start of the job, or has done so."""
        return self.state in _ENDING


def job_status(allocation: Allocation, ends_in: float | None = None) -> JobStatus:
    """How the job stands; state UNKNOWN, and `ends_in` for its end, if SLURM does not answer."""
    try:
        command = ("scontrol", "--oneliner", "show", "job", allocation.job)
        shown = _run(*command, timeout=_STATUS_TIMEOUT_S)
    except RunFailedError as error:
        log.warning("%s", error)
        return JobStatus("UNKNOWN", False, ends_in)
    return parse_status(shown, time.time())


def parse_status(shown: str, now: float) -> JobStatus:
    """The status in the line that `scontrol --oneliner show job` prints."""
    fields = dict(re.findall(r"(?:^|\s)([A-Za-z]+)=(\S*)", shown))
    ends = _timestamp(fields.get("EndTime", ""))
    return JobStatus(
        state=fields.get("JobState", "UNKNOWN"),
        preempted=_timestamp(fields.get("PreemptTime", "")) is not None,
        ends_in=None if ends is None else ends - now,
        restarts=int(fields.get("Restarts", 0)),
        node_list=fields.get("NodeList", ""),
        is_batch=fields.get("BatchFlag") == "1",
    )


def kill_wait() -> float:
    """Seconds between SIGTERM and SIGKILL when SLURM ends a job."""
    try:
        found = re.search(
            r"^KillWait\s*=\s*(\d+)", _run("scontrol", "show", "config"), re.MULTILINE
        )
    except RunFailedError:
        found = None
    return float(found[1]) if found else _DEFAULT_KILL_WAIT_S


def requeue(allocation: Allocation) -> None:
    """Put this job, of an array this task only, back into the queue; SLURM then ends its processes.

    Raises RunFailedError where SLURM refuses.
    """
    _run("scontrol", "requeue", allocation.job)


def cancel(allocation: Allocation) -> None:
    """End this job. Raises RunFailedError where SLURM refuses."""
    _run("scancel", allocation.job)


def node_address(node: str) -> str:
    """The address under which other nodes reach this one.

    The one that SLURM has for it, if that is an address: where several slurmd share a host, each
    has its own. Else the host's first.
    """
    try:
        shown = _run("scontrol", "--oneliner", "show", "node", node)
        found = re.search(r"\bNodeAddr=(\S+)", shown)
        if found:
            return str(ipaddress.ip_address(found[1]))
    except (RunFailedError, ValueError):
        pass
    addresses = _run("hostname", "-I").split()
    if not addresses:
        raise RunFailedError(f"{node}: `hostname -I` shows no address")
    return addresses[0]


def _timestamp(text: str) -> float | None:
    try:
        return datetime.fromisoformat(text).timestamp()
    except ValueError:
        return None  # Unknown, None, N/A


def _run(*command: str, timeout: float = _TIMEOUT_S) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=timeout)
    except FileNotFoundError:
        raise RunFailedError(f"{command[0]}: no such command; is SLURM on the PATH?") from None
    except subprocess.TimeoutExpired:
        raise RunFailedError(f"{' '.join(command)}: no answer in {timeout:.0f} s") from None
    except subprocess.CalledProcessError as error:
        said = " ".join((error.stderr or error.stdout).split())[-300:]
        raise RunFailedError(f"{' '.join(command)}: {said}") from None
    return done.stdout
