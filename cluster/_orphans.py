"""What a job's other nodes do when the first one is gone, and with it the allocation's process.

SLURM itself requeues a job that needs all of its nodes. From one that does not (--no-kill) it only
takes a lost node out, and without that of its batch script the job would stay as it is until its
time limit: so the nodes that are left put it back into the queue, or end it.
"""

from __future__ import annotations

import contextlib
import time

from cluster._causes import why_not_requeue
from cluster._shared_files import SharedFiles
from cluster.plan import JobPlan
from cluster.scheduler import Allocation, cancel, hostnames, job_status, requeue
from modular_lm.errors import RunFailedError
from modular_lm.tracking.run_folder import RunFolder

# SLURM takes a node for lost after SlurmdTimeout, by default 300 s.
_NOTICED_S = 900.0
# Of each node that is left, and there may be many: the controller has other work.
_POLL_S = 10.0
_NO_NODES = ("", "(null)")
_ENDED_OTHERWISE = ("CANCELLED", "COMPLETED", "TIMEOUT", "DEADLINE", "PREEMPTED")


def go_on_without_first_node(
    plan: JobPlan, allocation: Allocation, shared: SharedFiles, node: str
) -> None:
    """Called on `node` when the allocation cannot be reached any more: if that is because SLURM has
    lost the first node, requeue the job, or cancel it where it is not to be requeued. One node does
    it, the first to find out."""
    if not _has_lost_first(allocation) or not shared.claim():
        return
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


def _has_lost_first(allocation: Allocation) -> bool:
    """Whether SLURM has lost the first node of this start of the job, once it knows; not if the job
    has ended otherwise, was started anew, or nothing is known in time."""
    deadline = time.monotonic() + _NOTICED_S
    while True:
        status = job_status(allocation)
        if status.state != "UNKNOWN":
            if status.restarts != allocation.restarts or not status.is_batch:
                return False
            if status.state in _ENDED_OTHERWISE:
                return False
            with contextlib.suppress(RunFailedError):
                nodes = [] if status.node_list in _NO_NODES else hostnames(status.node_list)
                if nodes and allocation.nodes[0] not in nodes:
                    return True
                if status.is_ending:
                    return False
        if time.monotonic() >= deadline:
            return False
        time.sleep(_POLL_S)


def _say(plan: JobPlan, allocation: Allocation, text: str) -> None:
    """In the job's log: what a node prints goes to the first one."""
    with contextlib.suppress(OSError):
        log = RunFolder(plan.dump_dir).logs / f"slurm-{allocation.job}.out"
        with open(log, "a", encoding="utf-8") as file:
            file.write(f"{text}\n")
