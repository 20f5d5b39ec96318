"""What a job's other nodes do when the first one is gone, and with it the allocation's process.

SLURM itself requeues a job that needs all of its nodes. From one that does not (--no-kill) it only
takes a lost node out, and without that of its batch script the job would stay as it is until its
time limit: so the nodes that are left put it back into the queue, or end it.
"""

from __future__ import annotations

import contextlib
import time

from cluster._causes import why_not_requeue
from cluster.plan import JobPlan
from cluster.scheduler import Allocation, cancel, hostnames, job_status, requeue
from modular_lm.errors import RunFailedError
from modular_lm.tracking.run_folder import RunFolder

# SLURM takes a node for lost after SlurmdTimeout, by default 300 s.
_NOTICED_S = 900.0
_POLL_S = 1.0
# The first of the nodes that are left acts; the next one after this time, if it has not.
_TURN_S = 10.0
_ENDED_BY_USERS = ("CANCELLED", "COMPLETED", "TIMEOUT", "DEADLINE", "PREEMPTED")


def go_on_without_first_node(plan: JobPlan, allocation: Allocation, node: str) -> None:
    """Called on `node` when the allocation cannot be reached any more: if that is because SLURM has
    lost the first node, requeue the job, or cancel it where it is not to be requeued."""
    left = _nodes_without_first(allocation, time.monotonic() + _NOTICED_S)
    if node not in left:
        return
    time.sleep(left.index(node) * _TURN_S)
    if not _nodes_without_first(allocation, time.monotonic()):
        return  # another node has acted
    what = f"{allocation} has lost its first node, {allocation.nodes[0]}"
    try:
        why = None if not plan.requeue else why_not_requeue(plan, allocation, at_limit=False)
        if plan.requeue and why is None:
            _say(plan, allocation, f"{what}: requeued by {node}")
            requeue(allocation)
        else:
            _say(plan, allocation, f"error: {why}" if why else f"{what}: not requeued")
            cancel(allocation)
    except RunFailedError as error:
        _say(plan, allocation, f"error: {error}; submit the job again to continue")


def _nodes_without_first(allocation: Allocation, deadline: float) -> list[str]:
    """The nodes that are left of this start of the job once SLURM has lost its first; none if the
    job has ended otherwise, was started anew, or nothing is known by then."""
    while True:
        status = job_status(allocation)
        if status.state != "UNKNOWN":
            if status.restarts != allocation.restarts or not status.is_batch:
                return []
            if status.state in _ENDED_BY_USERS:
                return []
            with contextlib.suppress(RunFailedError):
                nodes = hostnames(status.node_list)
                if allocation.nodes[0] not in nodes:
                    return nodes
                if status.is_ending:
                    return []
        if time.monotonic() >= deadline:
            return []
        time.sleep(_POLL_S)


def _say(plan: JobPlan, allocation: Allocation, text: str) -> None:
    """In the job's log: what a node prints goes to the first one."""
    with contextlib.suppress(OSError):
        log = RunFolder(plan.dump_dir).logs / f"slurm-{allocation.job}.out"
        with open(log, "a", encoding="utf-8") as file:
            file.write(f"{text}\n")
