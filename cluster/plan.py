"""What the launcher decided and the allocation carries out, as one readable JSON file.

The launcher writes it at every submission, as `<dump_dir>/ray/slurm/plan.json`; the allocation only
reads it. Imports nothing heavy: login nodes read it too.
"""

from __future__ import annotations

import dataclasses
import json
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

from modular_lm.errors import ConfigError
from modular_lm.files import write_text_atomic


@dataclass(frozen=True)
class JobPlan:
    """A job of ours inside a SLURM allocation.

    script: module to run, e.g. "ray_jobs.train"; arguments: what follows it on the command line.
    dump_dir: the run's folder, on a file system that all nodes share.
    code: folder whose code runs, on the same file system; the PYTHONPATH of everything.
    requeue: put the job back into the queue when it ends before its work is done.
    min_nodes: how many nodes are enough, at the start and after a loss; 0: all of them.
    start_timeout_s: how long the nodes may take to come up.
    port_range: ports [first, end) of which every job takes a block.
    temp_root: short folder on each node's own disk.
    container: command before which `python3` runs in a container on each node, "" without one.
    """

    script: str
    arguments: list[str]
    dump_dir: str
    code: str
    nodes: int
    cpus_per_node: int
    gpus_per_node: int = 0
    requeue: bool = True
    min_nodes: int = 0
    start_timeout_s: int = 600
    port_range: tuple[int, int] = (20000, 32000)
    temp_root: str = "/tmp"
    container: str = ""

    @property
    def enough_nodes(self) -> int:
        return self.min_nodes or self.nodes

    @property
    def python(self) -> list[str]:
        """The interpreter on the nodes: the container's if there is one, else this one."""
        container = shlex.split(self.container)
        return [*container, "python3"] if container else [sys.executable]

    def write(self, path: Path) -> None:
        """Write the plan, replacing the one of an earlier submission."""
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text_atomic(path, json.dumps(dataclasses.asdict(self), indent=2) + "\n")

    @classmethod
    def read(cls, path: Path) -> JobPlan:
        """The plan in a file. Raises ConfigError, naming the file, if it is none."""
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ConfigError(f"{path}: no such plan; submit the job again") from None
        except ValueError as error:
            raise ConfigError(f"{path}: not JSON ({error}); submit the job again") from None
        if not isinstance(values, dict):
            raise ConfigError(f"{path}: expected an object; submit the job again")
        return _from_json(path, values)


def _from_json(path: Path, values: dict[str, Any]) -> JobPlan:
    known = {f.name: f for f in dataclasses.fields(JobPlan)}
    if foreign := sorted(values.keys() - known.keys()):
        raise ConfigError(f"{path}: unknown {', '.join(foreign)}; submit the job again")
    if isinstance(values.get("port_range"), list):
        values["port_range"] = tuple(values["port_range"])
    for name, hint in get_type_hints(JobPlan).items():
        expected = getattr(hint, "__origin__", hint)
        if name not in values:
            if known[name].default is dataclasses.MISSING:
                raise ConfigError(f"{path}: {name} is missing; submit the job again")
        elif type(values[name]) is not expected:
            raise ConfigError(
                f"{path}: {name} is a {type(values[name]).__name__}, expected "
                f"{expected.__name__}; submit the job again"
            )
    plan = JobPlan(**values)
    if not 0 < plan.enough_nodes <= plan.nodes:
        raise ConfigError(f"{path}: min_nodes={plan.min_nodes} of {plan.nodes} nodes")
    return plan
