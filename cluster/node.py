"""On every node of a job, under srun: check the node, run its Ray, end it and clean up.

`python -m cluster.node PLAN ATTEMPT HOST PORT` is started by `cluster.allocation` and does what
that says over the wire. When the wire is cut it ends everything here, so that nothing outlives the
job, and then sees to it that the job goes on if its first node is lost (`_orphans`). Signals of
SLURM mean the job, not this process: they are passed on, for that of a preemption is sent to the
steps of a job only.

Messages to a node: claim (first, size), start (head, dashboard), stop (grace_s). From it: hello
(node, address, host, word), claimed (taken), ready, lost (why), signal (number), stopped.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection
from pathlib import Path

import psutil

from cluster import _control, _ray_start
from cluster._control import Message
from cluster._orphans import go_on_without_first_node
from cluster._ray_logs import save_logs
from cluster._shared_files import SharedFiles
from cluster.plan import JobPlan
from cluster.ports import PortBlock, claimed
from cluster.scheduler import node_address, this_allocation
from modular_lm.errors import ConfigError, RunFailedError, UserFacingError, reason

_BEAT_S = 0.5
_SHARED_PATIENCE_S = 30.0
_CUT_GRACE_S = 2.0
_OWNER = "owner"


def main(plan_file: str, attempt: str, host: str, port: str) -> int:
    """Serve the allocation at host:port until it says stop; returns the exit code."""
    signals: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, lambda n, _: signals.append(n))
    name = os.environ["SLURMD_NODENAME"]
    plan = JobPlan.read(Path(plan_file))
    _ray_start.raise_open_files()
    shared = SharedFiles(plan.dump_dir, attempt)
    secret, word = _read_shared(shared, name)
    try:
        connection = _control.connect(host, int(port), secret)
    except (OSError, EOFError, AuthenticationError) as error:
        raise RunFailedError(f"{name}: no way to {host}:{port}: {reason(error)}") from error
    folder = _own_folder(_expanded(plan.temp_root, name), attempt, name)
    try:
        is_told = _Node(plan, name, attempt, folder, connection, signals).serve(word)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if not is_told:
        go_on_without_first_node(plan, this_allocation(), shared, name)
    return 0


class _Gone(Exception):
    """The allocation cannot be reached any more."""


@contextlib.contextmanager
def _on_the_wire() -> Iterator[None]:
    try:
        yield
    except (OSError, EOFError) as error:
        raise _Gone from error


class _Node:
    """This node's Ray and what the allocation knows of it."""

    def __init__(
        self,
        plan: JobPlan,
        name: str,
        attempt: str,
        folder: Path,
        connection: Connection,
        signals: list[int],
    ) -> None:
        self._plan, self._name, self._attempt = plan, name, attempt
        self._folder, self._connection, self._signals = folder, connection, signals
        self._address = node_address(name)
        # No other job has this folder, not even that of another SLURM with the same number.
        self._mark = str(folder)
        self._claim = contextlib.ExitStack()
        self._block: PortBlock | None = None
        self._ray: _ray_start.RayNode | None = None
        self._process: subprocess.Popen | None = None
        self._is_up = False

    def serve(self, word: str) -> bool:
        """Do what is asked until the end; the node's Ray is gone when this returns.

        word: what this node has written for the first to read. Returns whether the end was asked
        for; else the allocation is gone.
        """
        grace = _CUT_GRACE_S
        host = _this_machine()
        try:
            self._send("hello", node=self._name, address=self._address, host=host, word=word)
            while True:
                message = self._next()
                if message is not None and message["kind"] == "stop":
                    grace = message["grace_s"]
                    return True
                while self._signals:
                    self._send("signal", number=self._signals.pop(0))
                self._turn(message)
        except _Gone:
            print(f"{self._name}: the allocation is gone", flush=True)
            return False
        finally:
            self._end(grace)
            with contextlib.suppress(_Gone):
                self._send("stopped")

    def _next(self) -> Message | None:
        with _on_the_wire():
            if self._connection.poll(_BEAT_S):
                return _control.receive(self._connection)
        return None

    def _turn(self, message: Message | None) -> None:
        """Do what is asked and see how Ray is; what the system refuses is the end of this Ray."""
        try:
            if message is not None:
                self._do(message)
            self._look()
        except OSError as error:
            process, self._process = self._process, None
            if process is not None:
                with contextlib.suppress(OSError):
                    _ray_start.end(process, self._mark, 0)
            self._send("lost", why=reason(error))

    def _do(self, message: Message) -> None:
        if message["kind"] == "claim":
            self._claim.close()
            self._block = PortBlock(message["first"], message["size"])
            taken = self._claim.enter_context(claimed(self._block))
            self._send("claimed", first=self._block.first, taken=taken)
        elif message["kind"] == "start":
            assert self._block is not None
            self._ray = _ray_start.RayNode(
                self._name, self._address, self._block, self._folder, message["head"], self._mark
            )
            # Without it Ray would look for the one on this host, of which there may be several.
            dashboard = {"RAY_API_SERVER_ADDRESS": message["dashboard"]}
            self._is_up = False
            self._process = _ray_start.start(self._ray, self._plan, {**os.environ, **dashboard})

    def _look(self) -> None:
        """Report that this node's Ray came up, or that it is gone."""
        if self._process is None or self._ray is None:
            return
        if why := _ray_start.trouble(self._ray, self._process):
            _ray_start.end(self._process, self._mark, 0)
            self._process = None
            self._send("lost", why=why)
        elif not self._is_up and _ray_start.is_up(self._ray):
            self._is_up = True
            self._send("ready")

    def _end(self, grace_s: float) -> None:
        if self._process is not None:
            _ray_start.end(self._process, self._mark, grace_s)
        self._claim.close()
        save_logs(
            self._folder,
            Path(self._plan.dump_dir) / "logs" / "ray" / self._name / self._attempt,
        )

    def _send(self, kind: str, **fields: object) -> None:
        with _on_the_wire():
            _control.send(self._connection, {"kind": kind, **fields})


def _read_shared(shared: SharedFiles, name: str) -> tuple[bytes, str]:
    """The key of the wire, and the word that this node left. Raises ConfigError."""
    deadline = time.monotonic() + _SHARED_PATIENCE_S
    while True:
        try:
            return shared.secret, shared.answer(name)
        except OSError as error:
            if time.monotonic() > deadline:
                raise ConfigError(
                    f"dump_dir: {name} does not see what the first node wrote ({reason(error)}); "
                    "dump_dir must be on a file system that all nodes share"
                ) from error
        time.sleep(0.2)


def _expanded(temp_root: str, name: str) -> str:
    """The path with the values that variables have on this node. Raises ConfigError."""
    path = os.path.expandvars(temp_root)
    if "$" in path or not path.startswith("/"):
        raise ConfigError(
            f"temp_root={temp_root} on {name}: is {path}, no absolute path; see the site's profile"
        )
    return path


def _own_folder(temp_root: str, attempt: str, name: str) -> Path:
    """A new folder of this node's own disk; those that starts of this job have left go.

    Raises RunFailedError where it cannot be made.
    """
    job = attempt.rpartition("-")[0]
    # Node names may be long, sockets' paths may not.
    prefix = f"mlm{job}-{name[-12:]}-"
    for old in Path(temp_root).glob(f"{prefix}*"):
        with contextlib.suppress(OSError):
            if old.stat().st_uid == os.getuid() and not _is_in_use(old):
                shutil.rmtree(old)
    try:
        folder = Path(tempfile.mkdtemp(prefix=prefix, dir=temp_root))
        try:
            _ray_start.check_folder(folder)
            (folder / _OWNER).write_text(str(os.getpid()))
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
    except OSError as error:
        raise RunFailedError(f"temp_root={temp_root} on {name}: {reason(error)}") from error
    return folder


def _is_in_use(folder: Path) -> bool:
    """Whether the process that made it is there, as far as can be told."""
    try:
        return psutil.pid_exists(int((folder / _OWNER).read_text()))
    except (FileNotFoundError, ValueError):
        return True  # it may be about to say


def _this_machine() -> str:
    """Equal for nodes that are slurmd processes of one host."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{socket.gethostname()} {boot}"


if __name__ == "__main__":
    try:
        sys.exit(main(*sys.argv[1:]))
    except UserFacingError as error:
        print(f"error: {error}", flush=True)
        sys.exit(error.exit_code)
