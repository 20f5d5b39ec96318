"""Which ports a job's Ray listens on: a block per node out of a stated range.

The block follows from the job's number, so that jobs that share hosts rarely want the same one,
and is held by a socket on its first port for as long as the job runs, so that they never get the
same one. What others listen on is found by trying to bind; it is never touched.
"""

from __future__ import annotations

import contextlib
import errno
import socket
from collections.abc import Iterator
from dataclasses import dataclass

from modular_lm.errors import ConfigError

# Of a block: the socket that holds it, then these, then Ray's workers.
_NAMED = (
    "gcs",
    "dashboard",
    "client",
    "object_manager",
    "node_manager",
    "agent_http",
    "agent_grpc",
    "runtime_env_agent",
    "metrics",
)
_SPARE_WORKERS = 40


@dataclass(frozen=True)
class PortBlock:
    """`size` ports from `first` on."""

    first: int
    size: int

    def __getitem__(self, name: str) -> int:
        """The port of one of Ray's parts, by its name."""
        return self.first + 1 + _NAMED.index(name)

    @property
    def workers(self) -> tuple[int, int]:
        """The first and the last port of Ray's workers."""
        return self.first + 1 + len(_NAMED), self.first + self.size - 1


def block_size(cpus: int) -> int:
    """Ports that one node needs: Ray keeps a process per CPU, and more while actors start."""
    return 1 + len(_NAMED) + 4 * cpus + _SPARE_WORKERS


def candidates(number: int, size: int, per_host: int, span: tuple[int, int]) -> Iterator[int]:
    """First ports of blocks for the job with this number, the preferred one first.

    per_host: how many nodes of the job share a host; their blocks follow each other. Raises
    ConfigError if the span has no place for a single job.
    """
    first, end = span
    places = (end - first) // (size * per_host)
    if places < 1:
        raise ConfigError(
            f"port_range=[{first}, {end}]: {per_host} nodes of the job on a host need "
            f"{size * per_host} ports there; give more of them in the site's profile, or use fewer "
            "CPUs, or nodes on hosts of their own"
        )
    for k in range(places):
        yield first + (number + k) % places * size * per_host


@contextlib.contextmanager
def claimed(block: PortBlock) -> Iterator[list[int]]:
    """Hold the block inside the `with`; gives the ports that are taken, empty if all are free."""
    with socket.socket() as guard:
        try:
            # Without SO_REUSEADDR nobody else can bind it, listening or not.
            guard.bind(("", block.first))
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            yield [block.first]
            return
        yield [p for p in range(block.first + 1, block.first + block.size) if not _is_free(p)]


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        # Connections that are closing do not count, listeners on any address do.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            return False
    return True
