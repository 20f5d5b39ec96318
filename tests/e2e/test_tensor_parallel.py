"""A run on Ray that sharded workers begin and tensor-parallel ones end."""

from __future__ import annotations

from pathlib import Path

import pytest

from modular_lm.tracking.run_folder import RunFolder
from tests.support import TINY, Jobs, digests, losses

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(900)]


def test_it_sees_the_same_samples_and_losses(
    uninterrupted: RunFolder, jobs: Jobs, tmp_path: Path
) -> None:
    folder = RunFolder(tmp_path / "meshes")
    where = f"dump_dir={folder.path}"
    jobs.run("ray_jobs.train", *TINY, where, "stop_at=20")
    jobs.run("ray_jobs.train", *TINY, where, "distributed.tp_size=2")
    whole, found = losses(uninterrupted), losses(folder)
    assert whole.keys() == found.keys()
    assert max(abs(found[s] - whole[s]) / whole[s] for s in whole) < 1e-4
    assert digests(folder) == digests(uninterrupted)
    attempts = [e for e in folder.events() if e["event"] == "attempt"]
    assert attempts[1]["config_changes"] == ["distributed.tp_size: 1 -> 2"]
    nll, expected = (
        [*run.eval_metrics][-1]["validation/builtin/nll"] for run in (folder, uninterrupted)
    )
    assert nll == pytest.approx(expected, rel=1e-4)


def test_a_mesh_that_the_workers_cannot_form_is_refused(jobs: Jobs, tmp_path: Path) -> None:
    output = jobs.run(
        "ray_jobs.train", *TINY, f"dump_dir={tmp_path / 'run'}", "distributed.dp_shard=3", code=2
    )
    assert "distributed.dp_replicate=null, dp_shard=3, tp_size=1" in output
    assert "cannot be made of 2 workers" in output
    assert not (tmp_path / "run").exists()
