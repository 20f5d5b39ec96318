"""The nodes of a job as its first node sees them: brought up with a deadline, watched, taken down.

One srun starts `cluster.node` on each; what they print comes back through srun, so that a node
which fails before it can speak over the wire still says why, shared file system or not.
"""

from __future__ import annotations

import contextlib
import logging
import re
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cluster import _ray_start
from cluster._control import Message
from cluster._control import Nodes as Wire
from cluster._shared_files import SharedFiles
from cluster.plan import JobPlan
from cluster.ports import PortBlock, block_size, candidates
from cluster.scheduler import Allocation, node_address, number_of
from modular_lm.errors import RunFailedError

log = logging.getLogger(__name__)

_REPLY_S = 60.0
# A Ray that ends at once will do so again; one that took its time, on a busy machine, may not.
_QUICK_TRIES, _QUICK_S = 3, 15.0
_PAUSE_S = 2.0
_SHOWN_NAMES = 4
# What srun says of every step where CPUs are only counted.
_NO_NEWS = "support for cpu binding"
# For what a node does after its Ray has ended: logs, its folder.
_TIDYING_S = 5.0


@dataclass
class Node:
    """state: absent, here, claiming (ports), claimed, starting, up, lost or stopped.

    taken: ports of its block that others have; why: of a lost one; is_there: it can be reached;
    quick_ends: how often its Ray has ended soon after its start, at the time `asked`.
    """

    name: str
    state: str = "absent"
    is_there: bool = False
    address: str = ""
    host: str = ""
    word: str = ""
    block: PortBlock | None = None
    taken: int = 0
    why: str = ""
    asked: float = 0.0
    quick_ends: int = 0


class NodeGroup:
    """All nodes of a job; the first one has Ray's head.

    pump(seconds) lets events in, for at most that time: it ends in `on_message` for those of nodes,
    and raises where the job is to stop.
    """

    def __init__(
        self, plan: JobPlan, allocation: Allocation, shared: SharedFiles, output: Path
    ) -> None:
        self._plan, self._allocation, self._shared = plan, allocation, shared
        self._output = output
        self.nodes = {name: Node(name) for name in allocation.nodes}
        self._srun: subprocess.Popen | None = None
        self._wire: Wire | None = None
        self._began = time.monotonic()

    @property
    def head(self) -> Node:
        return self.nodes[self._allocation.nodes[0]]

    @property
    def head_address(self) -> str:
        """Where Ray's head answers, host:port."""
        assert self.head.block is not None
        return f"{self.head.address}:{self.head.block['gcs']}"

    @property
    def dashboard(self) -> str:
        """The URL of Ray's dashboard, which answers questions about its state."""
        assert self.head.block is not None
        return f"http://{self.head.address}:{self.head.block['dashboard']}"

    @property
    def up(self) -> list[Node]:
        return self._in("up")

    def _in(self, *states: str) -> list[Node]:
        return [node for node in self.nodes.values() if node.state in states]

    # ------------------------------------------------------------------ up

    def launch(
        self,
        plan_file: Path,
        environment: dict[str, str],
        tell: Callable[[str, Message], None],
    ) -> None:
        """Start `cluster.node` everywhere. `tell(node, message)` is called in threads."""
        self._wire = Wire(self._shared.secret, tell)
        n = len(self.nodes)
        gpus = self._plan.gpus_per_node
        command = [
            *("srun", "--no-kill", "--overlap", "--export=ALL", f"--nodes={n}", f"--ntasks={n}"),
            *("--ntasks-per-node=1", f"--cpus-per-task={self._plan.cpus_per_node}"),
            *([f"--gres=gpu:{gpus}"] if gpus else []),
            *("--cpu-bind=none", "--kill-on-bad-exit=0", "--mpi=none", "--input=none"),
            *("--label", "--unbuffered", *self._plan.python, "-m", "cluster.node"),
            *(str(plan_file), self._allocation.attempt),
            *(node_address(self.head.name), str(self._wire.port)),
        ]
        self._output.parent.mkdir(parents=True, exist_ok=True)
        self._began = time.monotonic()
        with open(self._output, "ab") as output:
            self._srun = subprocess.Popen(
                command,
                env=environment,
                cwd=self._plan.code,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=_ray_start.die_with_parent,
            )

    def bring_up(self, pump: Callable[[float], None]) -> None:
        """Ray runs on all nodes, or on enough of them, when this returns.

        Raises RunFailedError, naming the nodes that did not come and why, or ConfigError.
        """
        deadline = time.monotonic() + self._plan.start_timeout_s
        log.info("waiting for %s", _names(list(self.nodes.values())))
        self._wait(lambda: self._none("absent"), deadline, pump)
        self._check_enough("here")
        for node in self._in("here"):
            self._shared.check_answer(node.name, node.word)
        self._claim_ports(pump)
        # Anew: a node that does not come has taken all of the time until here.
        deadline = time.monotonic() + self._plan.start_timeout_s
        self._start([self.head], None, deadline, pump)
        if self.head.state == "up":
            self._start(self._in("claimed"), self.head_address, deadline, pump)
        self._check_enough("up")

    def _wait(
        self, condition: Callable[[], bool], deadline: float, pump: Callable[[float], None]
    ) -> None:
        while not condition() and time.monotonic() < deadline:
            pump(min(1.0, max(0.0, deadline - time.monotonic())))

    def _check_enough(self, state: str) -> None:
        """Raise RunFailedError unless enough nodes, and the first one, have this state."""
        there = self._in(state)
        others = [node for node in self.nodes.values() if node not in there]
        # Those that were to join the first one, which did not come.
        waited = self._in("claimed") if state == "up" and self.head in others else []
        failed = [node for node in others if node not in waited]
        for node in failed:
            if node.state != "lost":
                late = f"its Ray was not up {time.monotonic() - node.asked:.0f} s after its start"
                node.why = late if node.state == "starting" else self._last_words(node.name)
                node.state = "lost"
        missing = "; ".join(f"{node.name}: {node.why}" for node in failed)
        if self.head not in there or len(there) < self._plan.enough_nodes:
            waited_for = f"; {_names(waited)} waited for {self.head.name}" if waited else ""
            raise RunFailedError(
                f"{len(failed)} of {len(self.nodes)} nodes did not come, after "
                f"{time.monotonic() - self._began:.0f} s: {missing}{waited_for} "
                f"(log: {self._output})"
            )
        if others:
            log.warning("starting without %d nodes: %s", len(others), missing)

    def _claim_ports(self, pump: Callable[[float], None]) -> None:
        size = block_size(self._plan.cpus_per_node)
        nodes = self._in("here")
        per_host = max(Counter(node.host for node in nodes).values())
        number = number_of(self._allocation)
        for first in candidates(number, size, per_host, self._plan.port_range):
            before: Counter[str] = Counter()
            for node in nodes:
                node.state, node.block = (
                    "claiming",
                    PortBlock(first + size * before[node.host], size),
                )
                before[node.host] += 1
                self._send(node, "claim", first=node.block.first, size=size)
            deadline = time.monotonic() + _REPLY_S
            self._wait(lambda: not self._in("claiming"), deadline, pump)
            self._check_enough("claimed")
            if not any(node.taken for node in self._in("claimed")):
                return
        raise RunFailedError(
            f"ports {self._plan.port_range[0]} to {self._plan.port_range[1]}: in every block some "
            f"are taken on {', '.join(node.name for node in nodes if node.taken)}; end what has "
            "them, or leave these nodes out (exclude)"
        )

    def _start(
        self,
        nodes: list[Node],
        head: str | None,
        deadline: float,
        pump: Callable[[float], None],
    ) -> None:
        """Start Ray on these nodes; where it ends, again, for as long as there is hope."""
        while nodes:
            log.info("starting Ray on %s", _names(nodes))
            for node in nodes:
                node.state, node.asked = "starting", time.monotonic()
                self._send(node, "start", head=head, dashboard=self.dashboard)
            self._wait(lambda: self._none("starting"), deadline, pump)
            ended = [node for node in nodes if node.state == "lost" and node.is_there]
            pause_ends = time.monotonic() + _PAUSE_S
            nodes = [node for node in ended if node.quick_ends < _QUICK_TRIES]
            if pause_ends >= deadline:
                nodes = []
            for node in ended:
                again = "; trying again" if node in nodes else ""
                log.warning("Ray did not start on %s: %s%s", node.name, node.why, again)
            if nodes:
                self._wait(lambda: False, pause_ends, pump)
                nodes = [node for node in nodes if node.is_there]

    def _none(self, state: str) -> bool:
        """Whether no node is in this state any more."""
        self._notice_ended_tasks()
        return not self._in(state)

    # ------------------------------------------------------------------ events

    def on_message(self, name: str, message: Message) -> Node | None:
        """Take in what a node says; the node, if it had been up and is lost by that."""
        node, kind = self.nodes[name], message["kind"]
        node.is_there = kind != "gone"
        if kind == "hello" and node.state == "absent":
            node.state = "here"
            node.address, node.host, node.word = (message[k] for k in ("address", "host", "word"))
        elif kind == "claimed":
            node.state, node.taken = "claimed", len(message["taken"])
        elif kind == "ready":
            node.state = "up"
        elif kind == "stopped":
            node.state = "stopped"
        elif kind in ("lost", "gone") and node.state not in ("stopped", "lost"):
            was_up = node.state == "up"
            if node.state == "starting" and time.monotonic() - node.asked < _QUICK_S:
                node.quick_ends += 1
            node.state = "lost"
            node.why = message.get("why") or f"no connection; last: {self._last_words(name)}"
            return node if was_up else None
        return None

    def _notice_ended_tasks(self) -> None:
        """Nodes whose task ended before it could say anything are lost."""
        assert self._srun is not None
        for name in self._ended_tasks():
            if (node := self.nodes[name]).state == "absent":
                node.state, node.why = "lost", self._last_words(name)
        if self._srun.poll() is not None:
            for node in self._in("absent", "here", "claiming", "claimed", "starting"):
                node.state, node.why = "lost", self._last_words(node.name)

    def _ended_tasks(self) -> list[str]:
        names, ended = list(self.nodes), []
        for numbers in re.findall(r"^srun: error: .*: tasks? ([\d,-]+): ", self._said(), re.M):
            for part in numbers.split(","):
                first, _, last = part.partition("-")
                ended += names[int(first) : int(last or first) + 1]
        return ended

    def _last_words(self, name: str) -> str:
        """What a node's task printed last, else what srun did."""
        prefix = re.compile(rf"^\s*{list(self.nodes).index(name)}: (.*\w.*)$", re.M)
        said = prefix.findall(self._said())
        if not said:
            of_srun = re.findall(r"^srun: (.*)$", self._said(), re.M)
            said = [line for line in of_srun if _NO_NEWS not in line]
        return said[-1].strip()[-300:] if said else "it said nothing"

    def _said(self) -> str:
        with contextlib.suppress(OSError), open(self._output, "rb") as file:
            file.seek(max(0, self._output.stat().st_size - (1 << 20)))
            return file.read().decode(errors="replace")
        return ""

    # ------------------------------------------------------------------ down

    def take_down(self, seconds: float, pump: Callable[[float], None]) -> None:
        """End Ray, the other nodes first and the first one last; nothing is left on any node."""
        if self._srun is None or self._wire is None:
            return
        deadline = time.monotonic() + seconds
        others = [node for node in self.nodes.values() if node is not self.head]
        for nodes in (others, [self.head]):
            left = deadline - time.monotonic()
            grace = max(0.0, min(10.0, left / 2 - 1))
            asked = [node.name for node in nodes]
            for node in nodes:
                self._send(node, "stop", grace_s=grace)
            self._wait(
                lambda asked=asked: all(self._is_over(self.nodes[name]) for name in asked),
                time.monotonic() + max(grace + _TIDYING_S if left > 5 else left, 1.0),
                pump,
            )
        self._wire.close()
        try:
            self._srun.wait(max(1.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            self._srun.kill()
            self._srun.wait()

    def _is_over(self, node: Node) -> bool:
        """Whether nothing is to be waited for: it has stopped, never came, or is out of reach."""
        return node.state == "stopped" or not node.is_there

    def _send(self, node: Node, kind: str, **fields: object) -> None:
        assert self._wire is not None
        self._wire.send(node.name, {"kind": kind, **fields})


def _names(nodes: list[Node]) -> str:
    """The names of some nodes, of many the first ones."""
    shown = ", ".join(node.name for node in nodes[:_SHOWN_NAMES])
    more = len(nodes) - _SHOWN_NAMES
    return f"{shown} and {more} more" if more > 0 else shown
