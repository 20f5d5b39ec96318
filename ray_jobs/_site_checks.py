"""What `ray_jobs.doctor` looks at around a job: packages, Ray, SLURM, MLflow, caches, GPUs.

Each check returns findings and none raises for what it finds. Ray is joined by a process of its
own (`_ray_probe`), MLflow is asked without its client: neither is imported here.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import importlib.metadata
import json
import os
import platform
import re
import resource
import shutil
import socket
import sqlite3
import subprocess
import sys
import tomllib
import urllib.error
import urllib.request
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import modular_lm
from modular_lm.config import TrainConfig
from modular_lm.errors import UserFacingError, reason
from modular_lm.submission import submission
from modular_lm.tracking.mlflow_projection import tracking_uri
from ray_jobs._checks import Finding, existing_parent
from ray_jobs._session import SHORT_STOP_S
from ray_jobs._sockets import excess

_ENOUGH_SHM = 1 << 30
_ENOUGH_FILES = 4096
_PROBE_S = 90
_ANSWER_S = 6
_OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")
# Of sbatch, where they are not named as the option.
_VARIABLES = {"time": "TIMELIMIT"}
_NETWORK_DISKS = ("nfs", "nfs4", "lustre", "gpfs", "beegfs", "cifs", "fuse.sshfs", "ceph")


# ------------------------------------------------------------------ packages


def version_findings() -> list[Finding]:
    """Installed versions against the ranges of pyproject.toml."""
    python, needed = _declared()
    found = []
    if not SpecifierSet(python).contains(platform.python_version()):
        text = f"Python {platform.python_version()}, needs {python}"
        found.append(Finding("versions", "error", text, "use another Python"))
    good = 0
    for requirement in needed:
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            text = f"{requirement.name} is not installed, needs {requirement.specifier or 'any'}"
            found.append(Finding("versions", "error", text, f"pip install '{requirement}'"))
            continue
        if requirement.specifier.contains(version, prereleases=True):
            good += 1
        else:
            text = f"{requirement.name} {version}, tested with {requirement.specifier}"
            found.append(Finding("versions", "warning", text, f"pip install '{requirement}'"))
    text = f"Python {platform.python_version()}; {good} of {len(needed)} packages as required"
    return [*found, Finding("versions", "ok", text)] if good == len(needed) else found


def _declared() -> tuple[str, list[Requirement]]:
    """The range of Python, and the packages without the extras."""
    file = _project() / "pyproject.toml"
    if file.is_file():
        project = tomllib.loads(file.read_text())["project"]
        return project["requires-python"], [Requirement(r) for r in project["dependencies"]]
    metadata = importlib.metadata.metadata("modular-lm")
    needed = [Requirement(r) for r in metadata.get_all("Requires-Dist") or []]
    return metadata["Requires-Python"], [r for r in needed if r.marker is None]


def _project() -> Path:
    """The folder that holds the packages of the project."""
    return Path(modular_lm.__file__).resolve().parents[1]


# ------------------------------------------------------------------ Ray


def ray_findings(workers: int, use_gpu: bool | None, folder: Path) -> list[Finding]:
    """The Ray at RAY_ADDRESS, or whether one can be started here.

    workers: training workers; folder: where the job will write, which all nodes must see.
    """
    if not os.environ.get("RAY_ADDRESS"):
        return _ray_here()
    found = [*_token(), *_stop_wait()]
    command = [sys.executable, "-m", "ray_jobs._ray_probe", str(existing_parent(folder))]
    address = os.environ["RAY_ADDRESS"]
    paths = [str(_project()), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_PROBE_S, env=env)
    except subprocess.TimeoutExpired:
        text = f"RAY_ADDRESS={address}: no answer in {_PROBE_S} s"
        return [*found, Finding("ray", "error", text, "look whether its head node is alive")]
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        text = lines[-1].removeprefix("error: ") if lines else f"RAY_ADDRESS={address}: no answer"
        return [*found, Finding("ray", "error", text)]
    nodes = json.loads(done.stdout.splitlines()[-1])["nodes"]
    return [*found, *_nodes(nodes, workers, use_gpu, folder)]


def _nodes(nodes: list[dict], workers: int, use_gpu: bool | None, folder: Path) -> list[Finding]:
    cpus, gpus = (int(sum(node[what] for node in nodes)) for what in ("cpus", "gpus"))
    found = [Finding("ray", "ok", f"{len(nodes)} nodes, {cpus} CPUs, {gpus} GPUs")]

    def complain(level: str, text: str, advice: str) -> None:
        found.append(Finding("ray", level, text, advice))  # type: ignore[arg-type]

    if cpus < workers + 1:
        text = f"{workers} workers and their data need {workers + 1} CPUs, there are {cpus}"
        complain("warning", text, "the job will wait for more nodes")
    if use_gpu and gpus < workers:
        text = f"ray.use_gpu=true: {workers} workers, {gpus} GPUs"
        complain("error", text, "use fewer workers or a larger cluster")
    for node in nodes:
        if not node["project"]:
            text = f"{node['host']}: modular_lm cannot be imported"
            complain("warning", text, "install it there, or `ray job submit --working-dir .`")
        if node["sees"] is False and len(nodes) > 1:
            text = f"{node['host']}: does not see files in {existing_parent(folder)}"
            complain("error", text, "choose a dump_dir on a file system that all nodes share")
        for what, here in _own_versions().items():
            if node[what] != here:
                level = "error" if what != "torch" else "warning"
                complain(level, f"{node['host']}: {what} {node[what]}, here {here}", "use one")
    return found


def _own_versions() -> dict[str, str | None]:
    own: dict[str, str | None] = {"python": ".".join(platform.python_version_tuple()[:2])}
    for name in ("ray", "torch"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            own[name] = importlib.metadata.version(name)
    return own


def _token() -> list[Finding]:
    """The token of a cluster that wants one, as Ray looks for it."""
    if os.environ.get("RAY_AUTH_MODE") == "disabled" or os.environ.get("RAY_AUTH_TOKEN"):
        return []
    given = os.environ.get("RAY_AUTH_TOKEN_PATH")
    file = Path(given or "~/.ray/auth_token").expanduser()
    if not file.is_file():
        level = "error" if given or os.environ.get("RAY_AUTH_MODE") == "token" else "warning"
        advice = "copy the head's token there (mode 600), or name it in RAY_AUTH_TOKEN_PATH"
        return [Finding("token", level, f"{file}: no such file", advice)]
    if file.stat().st_mode & 0o077:
        return [Finding("token", "warning", f"{file}: others may read it", f"chmod 600 {file}")]
    return [Finding("token", "ok", str(file))]


def _stop_wait() -> list[Finding]:
    job = submission()
    if job is None or job.stop_wait_s >= SHORT_STOP_S:
        return []
    text = f"`ray job stop` kills this job after {job.stop_wait_s} s"
    return [Finding("ray", "warning", text, "submit it with cluster/runtime_env.yaml")]


def _ray_here() -> list[Finding]:
    """Whether a Ray can be started on this machine: ports, temporary folder, shared memory."""
    found = []
    folder = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"
    if too_long := excess(f"{folder}/ray"):
        text = f"temporary folder {folder}: too long for Ray's sockets, by {too_long} bytes"
        found.append(Finding("ray", "error", text, "export RAY_TMPDIR=/tmp, or as short a folder"))
    elif not os.access(folder, os.W_OK | os.X_OK):
        text = f"temporary folder {folder}: cannot be written"
        found.append(Finding("ray", "error", text, "export RAY_TMPDIR to one that can"))
    try:
        socket.create_server(("127.0.0.1", 0)).close()
    except OSError as error:
        found.append(Finding("ray", "error", f"no port on 127.0.0.1: {reason(error)}"))
    shared = Path("/dev/shm")
    if shared.is_dir() and (free := shutil.disk_usage(shared).free) < _ENOUGH_SHM:
        text = f"/dev/shm has {free >> 20} MiB free: Ray will keep objects on the disk"
        found.append(Finding("ray", "warning", text, "docker run --shm-size=8g, or more /dev/shm"))
    if (files := resource.getrlimit(resource.RLIMIT_NOFILE)[0]) < _ENOUGH_FILES:
        text = f"only {files} open files are allowed, Ray may need more"
        found.append(Finding("ray", "warning", text, "ulimit -n 65536"))
    text = "no RAY_ADDRESS: the job starts a Ray of its own on this machine"
    return found or [Finding("ray", "ok", text)]


# ------------------------------------------------------------------ SLURM


def slurm_findings(script: Path | None) -> list[Finding]:
    """Whether SLURM would take the batch script; nothing is submitted."""
    sbatch = shutil.which("sbatch")
    if script is None:
        return []
    if sbatch is None:
        text = f"{script}: not checked, there is no sbatch on this machine"
        return [Finding("slurm", "warning", text, "run the doctor on a login node")]
    command = [sbatch, "--test-only", str(script)]
    # Variables of sbatch would win over the script's lines; the launcher submits without them too.
    given = _given_by(script)
    env = {name: value for name, value in os.environ.items() if name not in given}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=env)
    except (OSError, subprocess.TimeoutExpired) as error:
        return [Finding("slurm", "error", f"sbatch --test-only: {reason(error)}")]
    said = " ".join(done.stderr.split()) or "sbatch --test-only said nothing"
    if done.returncode != 0:
        text = f"{script}: refused: {said}"
        return [Finding("slurm", "error", text, "correct the #SBATCH lines, or the site profile")]
    return [Finding("slurm", "ok", said.removeprefix("sbatch: "))]


def _given_by(script: Path) -> set[str]:
    """The variables of sbatch for options that the script's lines give."""
    given = re.findall(r"^#SBATCH\s+--([\w-]+)", script.read_text(errors="replace"), re.MULTILINE)
    names = {option: option.upper().replace("-", "_") for option in given}
    return {f"SBATCH_{_VARIABLES.get(option, name)}" for option, name in names.items()}


# ------------------------------------------------------------------ MLflow


def mlflow_finding(config: TrainConfig, folder: Path) -> Finding:
    """Whether the store of the run can be reached; the job would go on without."""
    c = config.logging.mlflow
    if not c.enabled:
        return Finding("mlflow", "ok", "logging.mlflow.enabled=false: the run's files are all")
    try:
        uri = tracking_uri(c.tracking_uri, folder)
    except (UserFacingError, ValueError) as error:
        return Finding("mlflow", "error", reason(error))
    if uri.startswith("sqlite:///"):
        return _sqlite(Path(uri.removeprefix("sqlite:///").partition("?")[0]).absolute())
    if uri.startswith(("http://", "https://")):
        return _server(uri)
    return Finding("mlflow", "ok", f"{uri.partition('://')[0]}: not checked")


def _sqlite(file: Path) -> Finding:
    there = existing_parent(file.parent)
    if not os.access(there, os.W_OK):
        return Finding("mlflow", "error", f"{file}: its folder cannot be written")
    if file.exists():
        try:
            with contextlib.closing(sqlite3.connect(f"{file.as_uri()}?mode=ro", uri=True)) as base:
                base.execute("SELECT count(*) FROM experiments").fetchone()
        except sqlite3.Error as error:
            return Finding("mlflow", "error", f"{file}: not a database of MLflow: {error}")
    if (kind := _file_system(there)) in _NETWORK_DISKS:
        text = f"{file}: sqlite on {kind} is unsafe with several writers"
        return Finding("mlflow", "warning", text, "start an MLflow server: MLFLOW_TRACKING_URI")
    return Finding("mlflow", "ok", f"sqlite {file}")


def _file_system(folder: Path) -> str:
    """The type of the file system of a folder, "" where that cannot be told."""
    try:
        import psutil
    except ImportError:
        return ""
    mounts = {p.mountpoint: p.fstype for p in psutil.disk_partitions(all=True)}
    return next((mounts[str(p)] for p in (folder, *folder.parents) if str(p) in mounts), "")


def _server(uri: str) -> Finding:
    address = f"{uri.rstrip('/')}/api/2.0/mlflow/experiments/search?max_results=1"
    name, password = (os.environ.get(f"MLFLOW_TRACKING_{x}") for x in ("USERNAME", "PASSWORD"))
    headers = {}
    if token := os.environ.get("MLFLOW_TRACKING_TOKEN"):
        headers["Authorization"] = f"Bearer {token}"
    elif name and password:
        coded = base64.b64encode(f"{name}:{password}".encode()).decode()
        headers["Authorization"] = f"Basic {coded}"
    try:
        request = urllib.request.Request(address, headers=headers)
        with urllib.request.urlopen(request, timeout=_ANSWER_S) as answer:
            json.load(answer)
    except urllib.error.HTTPError as error:
        text = f"{uri}: answers {error.code} {error.reason}"
        advice = "check MLFLOW_TRACKING_USERNAME and _PASSWORD, and the server's --allowed-hosts"
        return Finding("mlflow", "error" if error.code in (401, 403) else "warning", text, advice)
    except (OSError, ValueError, http.client.HTTPException) as error:
        advice = "the run will keep all in its files, and the same command sends it later"
        return Finding("mlflow", "warning", f"{uri}: no MLflow answers: {reason(error)}", advice)
    return Finding("mlflow", "ok", uri)


# ------------------------------------------------------------------ network, GPU


def offline() -> list[str]:
    """The switches that are on."""
    off = ("", "0", "false", "no", "off")
    return [name for name in _OFFLINE if os.environ.get(name, "").lower() not in off]


def network_finding(needs: dict[str, bool], advice: str = "") -> Finding:
    """What the job needs from the network, by name, and whether it is on disk already.

    advice: how to get what is not.
    """
    missing = [what for what, is_there in needs.items() if not is_there]
    switches = offline()
    mode = f"offline ({', '.join(switches)})" if switches else "online"
    if not missing:
        return Finding("network", "ok", f"{mode}; the job needs nothing that is not on disk")
    text = f"{mode}; not on disk: {', '.join(missing)}"
    return Finding("network", "error" if switches else "warning", text, advice)


def gpu_finding(use_gpu: bool | None, workers: int) -> Finding:
    """The GPUs of this machine against what is asked for."""
    try:
        import torch
    except (ImportError, OSError) as error:
        return Finding("gpu", "error", f"torch cannot be imported: {reason(error)}")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    text = f"{count} on this machine for {workers} workers" if count else "none on this machine"
    if use_gpu and count < workers:
        advice = "run the doctor where the job will run, use fewer workers, or ray.use_gpu=false"
        return Finding("gpu", "error", f"ray.use_gpu=true: {text}", advice)
    asked = "" if use_gpu is None else f"ray.use_gpu={str(use_gpu).lower()}: "
    return Finding("gpu", "ok", f"{asked}{text}")


def device_gib(use_gpu: bool | None, workers: int) -> float | None:
    """Memory in GiB for one worker on this machine: a GPU's, else a share of the main memory.

    None where it cannot be told.
    """
    try:
        import psutil
        import torch
    except (ImportError, OSError):
        return None
    if use_gpu is not False and torch.cuda.is_available():
        if torch.cuda.device_count() >= workers:
            return torch.cuda.get_device_properties(0).total_memory / 2**30
        return None
    return psutil.virtual_memory().total / workers / 2**30
