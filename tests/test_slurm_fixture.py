"""The SLURM of the tests is one: it runs, requeues and cancels jobs, and leaves nothing behind."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.slurm import NODES, Slurm

pytestmark = pytest.mark.slurm


def test_a_job_runs_on_both_nodes_and_once_more_when_requeued(slurm: Slurm, tmp_path: Path) -> None:
    out = tmp_path / "out"
    script = (
        '[ -n "$SLURM_RESTART_COUNT" ] && exit 3; '
        "srun --overlap printenv SLURMD_NODENAME; scontrol requeue $SLURM_JOB_ID; exec sleep 60"
    )
    job = slurm.run(
        *("sbatch", "--parsable", "--nodes=2", "--requeue", f"--output={out}"),
        *("--open-mode=append", "--wrap", script),
    ).strip()
    assert slurm.wait(job, "COMPLETED", "FAILED", timeout=60) == "FAILED"
    assert slurm.exit_code(job) == 3
    assert set(NODES) <= set(out.read_text().split())


def test_cancelled_jobs_leave_no_process(slurm: Slurm) -> None:
    job = slurm.run("sbatch", "--parsable", "--output=/dev/null", "--wrap", "sleep 600").strip()
    slurm.wait(job, "RUNNING", timeout=60)
    slurm.cancel_all()
    assert slurm.state(job) == "CANCELLED"
    assert slurm.processes() == []
