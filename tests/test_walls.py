"""Imports point one way, and the library does not need what only some of its users need."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.support import REPO

ABOVE = ("train", "eval", "generate", "tracking", "parallel", "optim", "cli")
HEAVY = ("ray", "mlflow", "xformers", "lm_eval", "huggingface_hub", "optuna")


Imports = dict[str, dict[str, list[str]]]


@pytest.fixture(scope="module")
def imports() -> Imports:
    """By file: the modules it imports, `anywhere` and `at_import`."""
    read = subprocess.run(
        [sys.executable, "-m", "tests.imports"],
        cwd=REPO,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    return json.loads(read.stdout)


def offenders(
    imports: Imports, part: str, banned: tuple[str, ...], when: str = "anywhere"
) -> list[str]:
    files = [f for f in imports if f == f"{part}.py" or f.startswith(f"{part}/")]
    assert files, f"no such part: {part}"
    return [
        f"{file}: {name}"
        for file in files
        for name in imports[file][when]
        if any(name == b or name.startswith(f"{b}.") for b in banned)
    ]


def library(*parts: str) -> tuple[str, ...]:
    return tuple(f"modular_lm.{p}" for p in parts)


def test_the_library_loads_heavy_packages_only_where_used(imports: Imports) -> None:
    assert offenders(imports, "modular_lm", HEAVY, "at_import") == []


@pytest.mark.parametrize(
    ("part", "banned"),
    [
        ("modular_lm", ("ray_jobs", "cluster", "ray")),
        ("modular_lm/config", ("torch", *library("data", "model", "train", "eval", "tracking"))),
        ("modular_lm/model", library(*ABOVE, "data", "tokenizer", "files")),
        ("modular_lm/parallel", library("data", "train", "eval", "tracking", "optim", "generate")),
        ("modular_lm/data", ("torch", *library(*ABOVE, "model"))),
        ("modular_lm/tracking", ("torch", *library("data", "model", "train", "eval", "parallel"))),
        ("modular_lm/eval", library("train", "tracking", "generate")),
        ("modular_lm/generate", library("data", "train", "eval", "tracking")),
        ("modular_lm/sweep", ("torch", *library("train", "eval", "generate", "parallel", "optim"))),
        ("ray_jobs", ("cluster",)),
    ],
)
def test_imports_point_one_way(imports: Imports, part: str, banned: tuple[str, ...]) -> None:
    assert offenders(imports, part, banned) == []


@pytest.mark.parametrize(
    ("module", "banned"),
    [
        ("modular_lm.config", ("torch", "numpy", *HEAVY)),
        ("modular_lm.train.run", ("torch", *HEAVY)),
        ("modular_lm.train.dry_run", ("torch", *HEAVY)),
        ("modular_lm.train.driver", ("torch", *HEAVY)),
        ("modular_lm.sweep.trials", ("torch", "scipy", "matplotlib", *HEAVY)),
        ("modular_lm.sweep.report", ("torch", "scipy", "matplotlib", *HEAVY)),
        ("modular_lm.train.worker", HEAVY),
        ("ray_jobs.train", ("torch", *HEAVY)),
        ("ray_jobs.prepare", ("torch", *HEAVY)),
        ("ray_jobs.generate", ("torch", *HEAVY)),
        ("ray_jobs.convert", ("torch", *HEAVY)),
        ("ray_jobs.modules", ("torch", *HEAVY)),
        ("cluster.slurm", ("torch", *HEAVY)),
        ("ray_jobs.report", ("torch", "scipy", "matplotlib", *HEAVY)),
        ("cluster.plan", ("torch", "numpy", *HEAVY)),
        ("ray_jobs.doctor", ("torch", *HEAVY)),
    ],
)
def test_mistakes_are_answered_before_anything_heavy_is_loaded(
    module: str, banned: tuple[str, ...]
) -> None:
    code = f"import sys, {module}; print([m for m in {banned!r} if m in sys.modules])"
    shown = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert shown.stdout.strip() == "[]"
