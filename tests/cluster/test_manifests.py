"""Files for clusters that do not run here: as far as they can be checked without one."""

from __future__ import annotations

import copy
import json
import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray.autoscaler
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from modular_lm.config import TrainConfig, load_config
from modular_lm.submission import STOP_WAIT
from tests.support import REPO

CLUSTER = REPO / "cluster"


def read(name: str) -> Any:
    return yaml.safe_load((CLUSTER / name).read_text())


def test_ray_up_is_what_rays_schema_and_launcher_accept() -> None:
    given = read("ray_up.yaml")
    schema = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())
    jsonschema.validate(given, schema)
    prepared = prepare_config(copy.deepcopy(given))
    validate_config(prepared)
    assert prepared["max_workers"] == len(given["provider"]["worker_ips"])
    assert all("RAY_AUTH_MODE=token" in prepared[k][-1] for k in _STARTS)
    with pytest.raises(jsonschema.ValidationError, match="worker_start_ray_command'"):
        jsonschema.validate({**given, "worker_start_ray_command": []}, schema)


_STARTS = ("head_start_ray_commands", "worker_start_ray_commands")


def test_the_runtime_environment_is_one_that_ray_accepts_and_gives_time_to_save() -> None:
    from ray.runtime_env import RuntimeEnv

    given = read("runtime_env.yaml")
    RuntimeEnv(**given)
    assert int(given["env_vars"][STOP_WAIT]) >= 60


def test_the_rayjobs_command_is_one_of_ours_and_writes_to_the_shared_volume() -> None:
    """Kubernetes itself has not seen it."""
    spec = read("kuberay.yaml")["spec"]
    python, flag, module, *arguments = shlex.split(spec["entrypoint"])
    assert (python, flag, module) == ("python", "-m", "ray_jobs.train")
    # The image has the repository in its working folder.
    arguments = [a.replace("/opt/modular-lm", str(REPO)) for a in arguments]
    config, _ = load_config(TrainConfig, arguments)
    cluster = spec["rayClusterSpec"]
    pods = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    for pod in (group["template"]["spec"] for group in pods):
        (container,) = pod["containers"]
        mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        assert {volume["name"] for volume in pod["volumes"]} == mounts.keys()
        assert str(config.dump_dir).startswith(mounts["shared"] + "/")
    assert int(yaml.safe_load(spec["runtimeEnvYAML"])["env_vars"][STOP_WAIT]) >= 60
    assert cluster["rayVersion"] == ray.__version__
    assert cluster["authOptions"]["mode"] == "token"


def test_extras_that_are_named_are_there() -> None:
    project = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
    (docker,) = re.findall(r"'\.\[(.+)\]'", (CLUSTER / "Dockerfile").read_text())
    (install,) = re.findall(r"EXTRAS \(e\.g\. (.+?)\)", (CLUSTER / "install.sh").read_text())
    named = {*docker.split(","), *install.split(",")}
    assert named <= project["optional-dependencies"].keys()


def test_the_dockerfile_has_known_instructions_and_copies_what_there_is() -> None:
    """Syntax only: there is no container runtime here."""
    text = re.sub(r"^#.*\n", "", (CLUSTER / "Dockerfile").read_text(), flags=re.M)
    lines = [line for line in text.replace("\\\n", " ").splitlines() if line.strip()]
    known = {"FROM", "RUN", "WORKDIR", "COPY", "ARG", "USER", "ENV"}
    assert {line.split()[0] for line in lines} <= known
    assert lines[0].startswith("FROM ")
    for line in lines:
        if line.startswith("COPY "):
            *sources, _ = line.split()[1:]
            assert [s for s in sources if not (REPO / s).exists()] == []
        if line.startswith("RUN "):
            assert all(shlex.split(part) for part in line.removeprefix("RUN ").split("&&"))
