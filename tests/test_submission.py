"""What a job makes of having been submitted: from variables that Ray sets, without Ray."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from modular_lm.config import ConvertConfig, GenerateConfig, PrepareConfig, TrainConfig
from modular_lm.errors import ConfigError
from modular_lm.submission import check_lasting, submission
from tests.support import REPO


@pytest.fixture
def working_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which a submitted job runs, as Ray names it."""
    folder = tmp_path / "session" / "runtime_resources" / "working_dir_files" / "_ray_pkg_0123"
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    values = {"runtime_env": {"env_vars": {"HF_TOKEN": "secret", "RAY_JOB_STOP_WAIT_TIME_S": "90"}}}
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps(values))
    monkeypatch.setenv("RAY_JOB_STOP_WAIT_TIME_S", "90")
    return folder


def test_a_job_that_was_not_submitted_writes_where_it_likes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR", raising=False)
    monkeypatch.chdir(tmp_path)
    assert submission() is None
    check_lasting(TrainConfig(dump_dir="runs/x"))


def test_what_a_submitted_job_knows(working_dir: Path) -> None:
    job = submission()
    assert job is not None
    assert job.working_dir == working_dir
    assert job.stop_wait_s == 90
    assert job.carried == {"HF_TOKEN", "RAY_JOB_STOP_WAIT_TIME_S"}
    assert "secret" not in repr(job)


@pytest.mark.parametrize("value", ["", "soon"])
def test_without_a_readable_wait_it_is_rays_default(
    working_dir: Path, monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    monkeypatch.setenv("RAY_JOB_STOP_WAIT_TIME_S", value)
    job = submission()
    assert job is not None
    assert job.stop_wait_s == 3


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (TrainConfig(), "dump_dir=runs/debug: "),
        (TrainConfig(dump_dir="runs/x"), "dump_dir=runs/x: "),
        (TrainConfig(dump_dir="../_ray_pkg_0123/x"), "dump_dir=../_ray_pkg_0123/x: "),
        (PrepareConfig(dst="out"), "dst=out: "),
        (GenerateConfig(out="texts.jsonl"), "out=texts.jsonl: "),
        (ConvertConfig(dst="model.pth"), "dst=model.pth: "),
    ],
)
def test_results_are_kept_out_of_the_temporary_copy(
    working_dir: Path, config: object, named: str
) -> None:
    with pytest.raises(ConfigError, match=f"^{named}.*absolute path that all nodes"):
        check_lasting(config)


@pytest.mark.parametrize(
    "config",
    [
        TrainConfig(dump_dir="/shared/runs/x"),
        PrepareConfig(dst="/shared/data"),
        PrepareConfig(),
        GenerateConfig(ckpt="relative/is/read"),
        ConvertConfig(dst="s3://bucket/model"),
    ],
)
def test_lasting_places_are_left_alone(working_dir: Path, config: object) -> None:
    check_lasting(config)


@pytest.mark.parametrize(
    ("module", "arguments", "key"),
    [
        ("ray_jobs.train", ["dump_dir=runs/x"], "dump_dir"),
        ("ray_jobs.prepare", ["src=text", "dst=out"], "dst"),
        ("ray_jobs.convert", ["from=hf", "src=x", "dst=out"], "dst"),
    ],
)
def test_every_job_says_so_at_once(
    working_dir: Path, module: str, arguments: list[str], key: str
) -> None:
    code = f"import sys; sys.path.insert(0, {str(REPO)!r}); import runpy; "
    code += f"sys.argv = ['x', *{arguments!r}]; runpy.run_module({module!r}, run_name='__main__')"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(f"error: {key}=")
    assert list(working_dir.iterdir()) == []


def test_only_code_and_configs_travel(tmp_path: Path) -> None:
    """By the function with which Ray packs a working directory, on a clone that was worked in."""
    from ray._private.runtime_env.packaging import create_package

    clone = tmp_path / "clone"
    kept = ["modular_lm/data/shards.py", "configs/debug.yaml", "cluster/runtime_env.yaml"]
    left = [
        "data/wiki/manifest.json",
        "data/wiki/train-00000.parquet",
        "runs/debug/checkpoints/0000000010/__0_0.distcp",
        "runs/mlflow.db",
        "mlflow.db",
        "text/notes.jsonl",
        "model.pth",
        ".venv/bin/python",
        ".git/HEAD",
        "modular_lm/__pycache__/x.pyc",
    ]
    for name in [*kept, *left]:
        (clone / name).parent.mkdir(parents=True, exist_ok=True)
        (clone / name).write_text(name)
    for name in (".rayignore", ".gitignore"):
        (clone / name).write_text((REPO / name).read_text())
    package = tmp_path / "package.zip"
    create_package(str(clone), package, include_gitignore=True, excludes=[])
    with zipfile.ZipFile(package) as archive:
        names = {name for name in archive.namelist() if not name.endswith("/")}
    assert {n for n in names if not Path(n).name.startswith(".")} == set(kept)
