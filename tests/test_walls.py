"""Imports point one way, and the library does not need what only some of its users need."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]
ABOVE = ("train", "eval", "generate", "tracking", "parallel", "optim", "cli")
HEAVY = ("ray", "mlflow", "xformers", "lm_eval", "huggingface_hub")


def imported(file: Path, *, top_level_only: bool) -> Iterator[str]:
    tree = ast.parse(file.read_text())
    for node in _at_import(tree) if top_level_only else _in_module(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            yield node.module or ""


def _in_module(node: ast.AST) -> Iterator[ast.AST]:
    """Everything but what runs only where the module is a command."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test) == "__name__ == '__main__'":
            continue
        yield child
        yield from _in_module(child)


def _at_import(node: ast.AST) -> Iterator[ast.AST]:
    """Everything that runs when a module is imported: all but the bodies of functions."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            continue
        yield child
        yield from _at_import(child)


def offenders(part: str, banned: tuple[str, ...], *, top_level_only: bool = False) -> list[str]:
    found = []
    files = sorted((REPO / part).rglob("*.py")) or [REPO / f"{part}.py"]
    for file in files:
        for name in imported(file, top_level_only=top_level_only):
            if any(name == b or name.startswith(f"{b}.") for b in banned):
                found.append(f"{file.relative_to(REPO)}: {name}")
    return found


def library(*parts: str) -> tuple[str, ...]:
    return tuple(f"modular_lm.{p}" for p in parts)


def test_the_library_loads_heavy_packages_only_where_used() -> None:
    assert offenders("modular_lm", HEAVY, top_level_only=True) == []


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
def test_imports_point_one_way(part: str, banned: tuple[str, ...]) -> None:
    assert offenders(part, banned) == []


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
