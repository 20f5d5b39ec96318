"""The process of a job's batch step: Ray on all nodes, the job's driver on it, signals into stops.

`python -m cluster.allocation PLAN` on the first node of a SLURM allocation (elsewhere inside one it
moves there). The driver is `python -m <script> <arguments>` with RAY_ADDRESS set; its exit code
decides. A signal of SLURM becomes SIGTERM to the driver, which is the run's stop request; when it
has ended, and Ray with it, the job is put back into the queue if its work is to go on by itself.
Exit codes as everywhere: 0 done, 1 failed, 2 bad input, 3 stopped and resumable.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from cluster import _ray_start
from cluster._causes import (
    Cause,
    cause_of_loss,
    cause_of_signal,
    combined,
    exit_code,
    why_not_requeue,
)
from cluster._control import Message
from cluster._nodes import NodeGroup
from cluster._shared_files import SharedFiles
from cluster.plan import JobPlan
from cluster.scheduler import Allocation, job_status, kill_wait, requeue, this_allocation
from modular_lm.cli import setup_logging
from modular_lm.errors import (
    EXIT_FAILED,
    EXIT_STOPPED,
    ConfigError,
    RunFailedError,
    UserFacingError,
)
from modular_lm.tracking.run_folder import RunFolder

log = logging.getLogger(__name__)

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
_TEARDOWN_S = 30.0
# News of a lost node may come after the driver failed for it.
_NEWS_S = 3.0
_REQUEUED_S = 60.0
_REQUEUE_TRIES, _REQUEUE_PAUSE_S = 5, 5.0

_DEFAULTS = {
    "OMP_NUM_THREADS": "1",  # as torchrun sets it
    "PYTHONUNBUFFERED": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    # Ray's own drain at SIGTERM is for clusters that others shrink; here the run has ended before.
    "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
}


class Stopped(Exception):
    """The job is to end before its driver was started."""


@dataclass(frozen=True)
class _Event:
    """A signal, what a node says, or the end of the driver: one of these is set."""

    signal: int | None = None
    node: str | None = None
    message: Message | None = None
    driver: int | None = None


def main(plan_file: Path) -> int:
    """Carry out the plan; returns the exit code. Raises UserFacingError."""
    allocation = this_allocation()
    plan = JobPlan.read(plan_file)
    if os.environ.get("SLURMD_NODENAME") != allocation.nodes[0]:
        command = _on_node(allocation.nodes[0], plan, plan_file)
        os.execvp(command[0], command)
    if len(allocation.nodes) != plan.nodes:
        raise ConfigError(
            f"{plan_file}: is for {plan.nodes} nodes, {allocation} has {len(allocation.nodes)}"
        )
    shared = SharedFiles(plan.dump_dir, allocation.attempt)
    shared.create()
    job = _Job(plan, plan_file, allocation, shared)
    try:
        code = job.run()
    finally:
        shared.remove()
    return job.requeued() if code == EXIT_STOPPED and job.is_to_go_on else code


def _on_node(node: str, plan: JobPlan, plan_file: Path) -> list[str]:
    """The command that is this process on `node`, from elsewhere in or outside the allocation."""
    where = ["srun", "--overlap", "--no-kill", "--nodes=1", "--ntasks=1", f"--nodelist={node}"]
    # Without --disable-status srun keeps the first Ctrl-C for itself.
    how = ["--cpu-bind=none", "--mpi=none", "--unbuffered", "--disable-status"]
    return [*where, *how, *plan.python, "-m", "cluster.allocation", str(plan_file)]


class _Job:
    """One start of a job: its events, its driver, its nodes."""

    def __init__(
        self, plan: JobPlan, plan_file: Path, allocation: Allocation, shared: SharedFiles
    ) -> None:
        self._plan, self._plan_file, self._allocation = plan, plan_file, allocation
        self._shared = shared
        self._events: queue.SimpleQueue[_Event] = queue.SimpleQueue()
        output = Path(plan.dump_dir) / "logs" / "ray" / f"{allocation.attempt}.log"
        self._nodes = NodeGroup(plan, allocation, shared, output)
        self._environment = _environment(plan, shared)
        self._driver: subprocess.Popen | None = None
        self._driver_code: int | None = None
        self._cause: Cause | None = None
        self._deadline = float("inf")
        self._lost = False
        self._interrupted = False
        self._kill_wait = kill_wait()
        ends_in = job_status(allocation).ends_in
        self._ends = None if ends_in is None else time.monotonic() + ends_in

    def run(self) -> int:
        for number in _SIGNALS:
            signal.signal(number, lambda n, _: self._events.put(_Event(signal=n)))
        code = EXIT_FAILED
        try:
            code = self._start_and_drive()
        finally:
            left = _TEARDOWN_S if self._cause is None else self._cause.teardown_s
            if left < _TEARDOWN_S:
                # SLURM may kill this process before its end, and the secret would stay.
                self._shared.remove()
            self._nodes.take_down(left, self._ignore_signals)
        return code

    @property
    def is_to_go_on(self) -> bool:
        """Whether the job stopped for something after which it is to go on by itself."""
        return self._cause is not None and self._cause.requeue

    # ------------------------------------------------------------------ start, drive

    def _start_and_drive(self) -> int:
        began = time.monotonic()
        tell = self._tell
        try:
            self._nodes.launch(self._plan_file, self._environment, tell)
            self._nodes.bring_up(self._pump)
        except Stopped:
            assert self._cause is not None
            if not self._cause.requeue:  # else what becomes of the job is said when that is known
                log.info(
                    "%s: stopped before Ray was up; the same command continues", self._allocation
                )
            return EXIT_STOPPED
        log.info(
            "Ray is up on %d nodes after %.0f s, head %s",
            len(self._nodes.up),
            time.monotonic() - began,
            self._nodes.head_address,
        )
        self._start_driver()
        while self._driver_code is None:
            self._turn()
        driver = self._driver_code
        if driver == EXIT_FAILED or driver < 0:
            self._hear_of_losses()
            log.info("the driver ended with %s", _ray_start.how(driver))
        code = exit_code(driver, self._cause, self._lost)
        if code == EXIT_STOPPED and self._cause is None and self._lost:
            self._cause = cause_of_loss("the run failed with a node that was lost")
        return code

    def _start_driver(self) -> None:
        command = [sys.executable, "-m", self._plan.script, *self._plan.arguments]
        ray = {
            "RAY_ADDRESS": self._nodes.head_address,
            "RAY_API_SERVER_ADDRESS": self._nodes.dashboard,
        }
        driver = subprocess.Popen(
            command,
            cwd=self._plan.code,
            env={**self._environment, **ray},
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=_ray_start.die_with_parent,
        )
        self._driver = driver
        tell = self._events.put
        threading.Thread(target=lambda: tell(_Event(driver=driver.wait())), daemon=True).start()

    def _turn(self) -> None:
        """Take one event in, or find that the driver's time is up."""
        left = self._deadline - time.monotonic()
        with contextlib.suppress(queue.Empty):
            self._take(self._events.get(timeout=max(0.0, min(left, 3600.0))))
        if self._deadline <= time.monotonic() and self._driver_code is None:
            assert self._driver is not None
            log.warning("the driver has not ended in time: it is killed")
            self._deadline = float("inf")
            self._driver.kill()

    def _hear_of_losses(self) -> None:
        deadline = time.monotonic() + _NEWS_S
        while not self._lost and (left := deadline - time.monotonic()) > 0:
            with contextlib.suppress(queue.Empty):
                self._take(self._events.get(timeout=left))

    # ------------------------------------------------------------------ events

    def _tell(self, node: str, message: Message) -> None:
        self._events.put(_Event(node=node, message=message))

    def _pump(self, seconds: float) -> None:
        """While the nodes come up: a signal ends the waiting."""
        with contextlib.suppress(queue.Empty):
            self._take(self._events.get(timeout=seconds))
        if self._cause is not None:
            raise Stopped

    def _ignore_signals(self, seconds: float) -> None:
        """While the nodes are taken down there is nothing that a signal could change."""
        with contextlib.suppress(queue.Empty):
            event = self._events.get(timeout=seconds)
            if event.node is not None and event.message is not None:
                self._nodes.on_message(event.node, event.message)

    def _take(self, event: _Event) -> None:
        if event.driver is not None:
            self._driver_code = event.driver
        elif event.signal == signal.SIGINT:
            self._on_interrupt()
        elif event.signal is not None:
            self._on_signal(event.signal)
        elif event.node in self._nodes.nodes and event.message is not None:
            if event.message["kind"] == "signal":
                # All nodes get the same; one is enough.
                if event.node == self._nodes.head.name:
                    self._on_signal(event.message["number"])
            elif lost := self._nodes.on_message(event.node, event.message):
                self._on_loss(lost.name, lost.why)

    def _on_signal(self, number: int) -> None:
        known = None if self._ends is None else self._ends - time.monotonic()
        status = job_status(self._allocation, known)
        self._stop(cause_of_signal(number, self._allocation, status, self._kill_wait))

    def _on_interrupt(self) -> None:
        """Ctrl-C asks for the end, another one does not wait for it."""
        if self._interrupted:
            log.warning("interrupted again: no more time to save")
            self._deadline = time.monotonic()
        else:
            self._interrupted = True
            self._on_signal(signal.SIGINT)

    def _on_loss(self, name: str, why: str) -> None:
        self._lost = True
        left = len(self._nodes.up)
        log.warning("node %s is lost (%s); nodes left: %d", name, why, left)
        is_head = name == self._nodes.head.name
        if is_head or left < self._plan.enough_nodes:
            reason = f"{self._allocation} has lost node {name}: {why}"
            self._stop(cause_of_loss(reason, is_head=is_head))

    def _stop(self, cause: Cause) -> None:
        """The driver is to save and end; later causes can only shorten its time, or forbid the
        requeue."""
        deadline = time.monotonic() + cause.driver_s
        if self._cause is not None:
            is_sooner = deadline < self._deadline
            self._cause = combined(self._cause, cause, is_sooner=is_sooner)
            self._deadline = min(deadline, self._deadline)
            return
        self._cause, self._deadline = cause, deadline
        log.info("%s: stopping, with %.0f s to save", cause.reason, cause.driver_s)
        if self._driver is None or self._driver_code is not None:
            return
        folder = RunFolder(self._plan.dump_dir)
        if folder.events_file.exists() and folder.stop_requested() is None:
            # Else the run would know of a SIGTERM only, not of what stood behind it.
            with contextlib.suppress(OSError, UserFacingError):
                folder.request_stop(cause.reason)
                folder.append_event("stop_requested", reason=cause.reason)
        self._driver.send_signal(signal.SIGTERM)

    # ------------------------------------------------------------------ end

    def requeued(self) -> int:
        """Put the job back into the queue if it may be; returns the exit code.

        Raises RunFailedError if it would go on like that for ever.
        """
        assert self._cause is not None
        if not self._plan.requeue:
            print(f"{self._cause.reason}: not requeued; the same command continues", flush=True)
            return EXIT_STOPPED
        at_limit = self._cause.at_limit
        if why := why_not_requeue(self._plan, self._allocation, at_limit=at_limit):
            raise RunFailedError(why)
        print(f"{self._cause.reason}: requeued", flush=True)
        for left in reversed(range(_REQUEUE_TRIES)):
            try:
                requeue(self._allocation)
            except RunFailedError as error:
                again = "trying again" if left else "submit the job again to continue"
                print(f"{error}; {again}", flush=True)
                # It may have been understood although the answer did not come.
                if not left or self._is_signalled_within(_REQUEUE_PAUSE_S):
                    break
            else:
                # SLURM ends this process. One that ended before could be taken for a finished job.
                self._is_signalled_within(_REQUEUED_S)
                break
        return EXIT_STOPPED

    def _is_signalled_within(self, seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        with contextlib.suppress(queue.Empty):
            while True:
                left = max(0.0, deadline - time.monotonic())
                if self._events.get(timeout=left).signal is not None:
                    return True
        return False


def _environment(plan: JobPlan, shared: SharedFiles) -> dict[str, str]:
    """The environment of everything that runs in the job; the user's own values win."""
    found = {**_DEFAULTS, **os.environ}
    found.pop("RAY_ADDRESS", None)
    path = [plan.code, *filter(None, [found.get("PYTHONPATH")])]
    return found | {
        "PYTHONPATH": os.pathsep.join(path),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(shared.token),
    }


if __name__ == "__main__":
    setup_logging()
    try:
        if len(sys.argv) != 2:
            raise ConfigError("usage: python -m cluster.allocation PLAN")
        sys.exit(main(Path(sys.argv[1])))
    except UserFacingError as failure:
        print(f"error: {failure}", file=sys.stderr, flush=True)
        sys.exit(failure.exit_code)
