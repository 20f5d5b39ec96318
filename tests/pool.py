"""Four processes that wait for work: what a test wants to see of several ranks, without starting
any.

    def losses(seed: int) -> float:                    # importable, arguments and result picklable
        world = init_world(use_gpu=False)              # the group of the ranks that run it, gloo
        ...

    def test_it(pool: Pool) -> None:
        assert len(set(pool.run(4, losses, 7))) == 1   # one result per rank, in their order

The fixture `pool` is one for the session; its processes start with the first `run`. Each `run` has
a process group of its own, of 1, 2 or any number up to SIZE ranks, which is gone afterwards. A task
that raises, hangs or kills its process fails the test that called it, with what every rank says
(for one that waits, its stack). Who waits for a rank that raised is told by Gloo that it is gone;
where a rank cannot end the task the processes are replaced.

The processes are forked from one that has imported what tasks need, one thread each. Nothing else
is kept between tasks, but what a task leaves behind in modules stays: undo it there.
"""

from __future__ import annotations

import contextlib
import faulthandler
import importlib
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Client, Connection, Listener, wait
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

SIZE = 4
LIMIT = 240.0
"""Seconds that a task may take; far more than any needs, also on a busy machine."""
GRACE = 10.0
"""Seconds that the others have to end once one rank has failed."""

_REPO = Path(__file__).resolve().parents[1]
_KEY = b"tests.pool"


class PoolError(AssertionError):
    """A task did not end well on every rank; says what each of them did."""


class Pool(contextlib.AbstractContextManager["Pool"]):
    """See the module's text. folder: for logs and rendezvous files; short, it holds a socket."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._parent: subprocess.Popen | None = None
        self._ranks: list[tuple[Connection, int]] = []
        self._started = self._tasks = 0

    def run(self, size: int, task: Callable[..., T], *args: Any, limit: float = LIMIT) -> list[T]:
        """`task(*args)` on the ranks 0..size-1 of one process group: their results, in order."""
        assert 1 <= size <= SIZE
        if self._parent is None:
            self._start()
        self._tasks += 1
        store = self._folder / f"store{self._tasks}"
        ranks = self._ranks[:size]
        with contextlib.suppress(OSError):  # a rank that is gone answers with the end of its file
            for rank, (connection, _) in enumerate(ranks):
                connection.send((_name(task), args, str(store), rank, size))
        answers = self._collect([connection for connection, _ in ranks], limit)
        if len(answers) == size and all(ok for ok, _ in answers.values()):
            return [answers[rank][1] for rank in range(size)]
        raise PoolError(f"{task.__qualname__} on {size} ranks\n{self._explain(size, answers)}")

    def _collect(self, ranks: list[Connection], limit: float) -> dict[int, tuple[bool, Any]]:
        """What each rank answered: (True, its result) or (False, why not). Silent ones lack."""
        answers: dict[int, tuple[bool, Any]] = {}
        deadline = time.monotonic() + limit
        while len(answers) < len(ranks):
            waiting = [c for rank, c in enumerate(ranks) if rank not in answers]
            ready = wait(waiting, max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for connection in ready:
                rank = ranks.index(connection)  # type: ignore[arg-type]
                try:
                    answers[rank] = connection.recv()  # type: ignore[union-attr]
                except (EOFError, OSError):
                    answers[rank] = (False, f"its process died\n{self._log(rank)}")
                if not answers[rank][0]:
                    deadline = min(deadline, time.monotonic() + GRACE)
        return answers

    def _explain(self, size: int, answers: dict[int, tuple[bool, Any]]) -> str:
        """What every rank did, and new processes where some are lost."""
        silent = [rank for rank in range(size) if rank not in answers]
        for rank in silent:
            os.kill(self._ranks[rank][1], signal.SIGUSR1)
        if silent:
            time.sleep(1.0)  # for the stacks to reach the logs
        parts = []
        for rank in range(size):
            ok, value = answers.get(rank, (False, f"has not ended\n{self._log(rank)}"))
            parts.append(f"--- rank {rank}: {'ended' if ok else value}")
        if silent or any(not ok and "its process died" in value for ok, value in answers.values()):
            self.close()
        return "\n".join(parts)

    def _log(self, rank: int) -> str:
        return self._log_file(rank).read_text(errors="replace")[-6000:]

    def _log_file(self, rank: int) -> Path:
        return self._folder / f"{self._started}-rank{rank}.log"

    def _start(self) -> None:
        self._started += 1
        address = str(self._folder / f"socket{self._started}")
        logs = [str(self._log_file(rank)) for rank in range(SIZE)]
        with Listener(address, "AF_UNIX", authkey=_KEY) as listener:
            self._parent = subprocess.Popen(
                [sys.executable, "-m", "tests.pool", address, *logs],
                cwd=_REPO,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                start_new_session=True,
            )
            found: dict[int, tuple[Connection, int]] = {}
            while len(found) < SIZE:
                connection = listener.accept()
                rank, pid = connection.recv()
                found[rank] = (connection, pid)
        self._ranks = [found[rank] for rank in range(SIZE)]

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the processes; a later `run` starts others."""
        if self._parent is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._parent.pid, signal.SIGKILL)
        self._parent.wait()
        for connection, _ in self._ranks:
            connection.close()
        self._parent, self._ranks = None, []


def _name(task: Callable[..., Any]) -> tuple[str, str]:
    """Where the processes find a task; also that of a module that runs as a command here."""
    module = task.__module__
    if module == "__main__":
        module = sys.modules["__main__"].__spec__.name  # type: ignore[union-attr]
    return module, task.__qualname__


# ------------------------------------------------------------------ the processes


def _main(address: str, logs: list[str]) -> None:
    import torch

    importlib.import_module("modular_lm.train.trainer")
    torch.set_num_threads(1)
    for rank, log in enumerate(logs):
        if os.fork() == 0:
            try:
                _serve(address, rank, log)
            finally:
                os._exit(0)  # Gloo's threads do not survive the interpreter's own end
    for _ in logs:
        os.wait()


def _serve(address: str, rank: int, log: str) -> None:
    output = open(log, "w", buffering=1)  # noqa: SIM115 (until the process ends)
    os.dup2(output.fileno(), 1)
    os.dup2(output.fileno(), 2)
    faulthandler.enable(output)
    faulthandler.register(signal.SIGUSR1, output, all_threads=True)
    with Client(address, authkey=_KEY) as connection:
        connection.send((rank, os.getpid()))
        while True:
            try:
                request = connection.recv()
            except EOFError:
                return
            try:
                answer = (True, _perform(*request))
            except Exception:
                answer = (False, traceback.format_exc())
            try:
                connection.send(answer)
            except (TypeError, AttributeError, ValueError):  # what cannot be pickled
                connection.send((False, traceback.format_exc()))


def _perform(
    where: tuple[str, str], args: tuple[Any, ...], store: str, rank: int, size: int
) -> Any:
    import torch.distributed as dist

    module, name = where
    task = getattr(importlib.import_module(module), name)
    group = dist.FileStore(store, size)
    dist.init_process_group("gloo", store=group, rank=rank, world_size=size)
    try:
        dist.barrier()  # nobody may leave before all have joined
        return task(*args)
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    _main(sys.argv[1], sys.argv[2:])
