"""README and docs point to what is there."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.support import REPO

PAGES = [REPO / "README.md", REPO / "CHANGELOG.md", *sorted((REPO / "docs").rglob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPO)))
def test_links_and_commands_lead_somewhere(page: Path) -> None:
    text = page.read_text()
    links = re.findall(r"\]\(([^)#]+)", text)
    broken = [x for x in links if "://" not in x and not (page.parent / x).exists()]
    modules = set(re.findall(r"-m ((?:ray_jobs|modular_lm|benchmarks)(?:\.\w+)*)", text))
    missing = [name for name in sorted(modules) if find_spec(name) is None]
    configs = set(re.findall(r"config=(configs/\S+\.yaml)", text))
    absent = [name for name in sorted(configs) if not (REPO / name).is_file()]
    assert (broken, missing, absent) == ([], [], [])
