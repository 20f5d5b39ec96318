"""`python -m ray_jobs._ray_probe FOLDER`: join the Ray at RAY_ADDRESS and say what its nodes are.

Run by `ray_jobs.doctor` in a process of its own, which may be ended when Ray does not answer.
Prints one line of JSON, {"nodes": [{"host", "cpus", "gpus", "python", "ray", "torch", "project",
"sees"}]}. `project`: whether modular_lm can be imported there; `sees`: whether the node sees a file
that this process has just made in FOLDER, null if it could not be made.
"""

from __future__ import annotations

import importlib.util
import json
import platform
import socket
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from modular_lm.cli import setup_logging
from modular_lm.errors import UserFacingError
from ray_jobs._session import ray_session


def main(folder: Path) -> int:
    """Ask every node; returns the exit code."""
    import ray

    setup_logging()
    try:
        with ray_session():
            marker = _marker(folder)
            try:
                nodes = [node for node in ray.nodes() if node["Alive"]]
                asked = [_ask(node, marker and marker.name) for node in nodes]
                answers = [
                    {**_resources(n), **a} for n, a in zip(nodes, ray.get(asked), strict=True)
                ]
            finally:
                if marker is not None:
                    marker.close()
    except UserFacingError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(json.dumps({"nodes": answers}), flush=True)
    return 0


def _marker(folder: Path) -> Any:
    try:
        return tempfile.NamedTemporaryFile(dir=folder, prefix=".modular-lm-")
    except OSError:
        return None


def _resources(node: dict[str, Any]) -> dict[str, float]:
    there = node["Resources"]
    return {"cpus": there.get("CPU", 0), "gpus": there.get("GPU", 0)}


def _ask(node: dict[str, Any], marker: str | None) -> Any:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
    return ray.remote(num_cpus=0)(_look).options(scheduling_strategy=there).remote(marker)


def _look(marker: str | None) -> dict[str, Any]:
    """Runs on the node. Sent as it is, for the project may not be there."""
    return {
        "host": socket.gethostname(),
        "python": ".".join(platform.python_version_tuple()[:2]),
        **{name: _version(name) for name in ("ray", "torch")},
        "project": importlib.util.find_spec("modular_lm") is not None,
        "sees": None if marker is None else Path(marker).exists(),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
