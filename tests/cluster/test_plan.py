"""A plan survives its file, and a file that is none is named."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.plan import JobPlan
from modular_lm.errors import ConfigError

PLAN = JobPlan(
    script="ray_jobs.train",
    arguments=["config=/shared/run/base_config.yaml", "dump_dir=/shared/run", "steps=3"],
    dump_dir="/shared/run",
    code="/shared/run/code",
    nodes=2,
    cpus_per_node=4,
    gpus_per_node=1,
    min_nodes=1,
    port_range=(21000, 22000),
)


def test_a_plan_is_read_as_it_was_written(tmp_path: Path) -> None:
    file = tmp_path / "ray" / "slurm" / "plan.json"
    PLAN.write(file)
    assert JobPlan.read(file) == PLAN
    assert PLAN.enough_nodes == 1


def test_python_on_the_nodes_is_that_of_the_container() -> None:
    assert PLAN.python == [sys.executable]
    inside = replace(PLAN, container="apptainer exec 'my image.sif'").python
    assert inside == ["apptainer", "exec", "my image.sif", "python3"]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"nodes": "2"}, "nodes is a str, expected int"),
        ({"requeue": 1}, "requeue is a int, expected bool"),
        ({"arguments": "steps=3"}, "arguments is a str, expected list"),
        ({"nods": 2}, "unknown nods"),
        ({"min_nodes": 3}, "min_nodes=3 of 2 nodes"),
        ({"nodes": 0, "min_nodes": 0}, "of 0 nodes"),
        ({"script": None}, "script is a NoneType"),
    ],
)
def test_a_foreign_plan_is_refused_in_one_line(tmp_path: Path, change: dict, named: str) -> None:
    file = tmp_path / "plan.json"
    PLAN.write(file)
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ConfigError, match=rf"^{file}: .*{named}"):
        JobPlan.read(file)


@pytest.mark.parametrize("text", ["", "{", "[1]", "{}"])
def test_what_is_no_plan_names_the_file(tmp_path: Path, text: str) -> None:
    file = tmp_path / "plan.json"
    file.write_text(text)
    with pytest.raises(ConfigError, match=rf"^{file}: "):
        JobPlan.read(file)
    with pytest.raises(ConfigError, match="no such plan"):
        JobPlan.read(tmp_path / "none.json")
