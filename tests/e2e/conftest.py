"""Whole jobs as a user starts them: subprocesses on one shared Ray, in folders of their own."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from modular_lm.tracking.run_folder import RunFolder
from tests.support import TINY, Jobs, end


@pytest.fixture(scope="session")
def uninterrupted(ray_head: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A run of 40 steps with two workers, nothing happening."""
    folder = RunFolder(tmp_path_factory.mktemp("runs") / "whole")
    Jobs(ray_head).run("ray_jobs.train", *TINY, f"dump_dir={folder.path}")
    return folder


@pytest.fixture
def jobs(ray_head: dict[str, str]) -> Iterator[Jobs]:
    """Jobs on the session's Ray; whatever still runs at the end of the test is ended."""
    started = Jobs(ray_head)
    yield started
    for process in started.started:
        end(process)


@pytest.fixture
def plain_jobs(cache: Path) -> Iterator[Jobs]:
    """Jobs without a Ray to join."""
    environment = {**os.environ, "MODULAR_LM_CACHE": str(cache), "PYTHONUNBUFFERED": "1"}
    environment.pop("RAY_ADDRESS", None)
    started = Jobs(environment)
    yield started
    for process in started.started:
        end(process)
