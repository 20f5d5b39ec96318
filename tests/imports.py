"""What each of our modules imports, read from its source: `python -m tests.imports` prints JSON.

It runs in a process of its own: CPython 3.11's parser keeps its recursion depth once for the
whole interpreter (python/cpython#106905), so beside the threads of Ray, `ast.parse` can fail.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
OURS = ("modular_lm", "ray_jobs", "cluster")


def imports(file: Path) -> dict[str, list[str]]:
    """The modules that a file imports: `anywhere`, and those `at_import` of itself."""
    tree = ast.parse(file.read_text())
    return {
        "anywhere": list(_names(file, _in_module(tree))),
        "at_import": list(_names(file, _at_import(tree))),
    }


def _names(file: Path, nodes: Iterator[ast.AST]) -> Iterator[str]:
    for node in nodes:
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


if __name__ == "__main__":
    files = sorted(file for part in OURS for file in (REPO / part).rglob("*.py"))
    print(json.dumps({str(file.relative_to(REPO)): imports(file) for file in files}))
