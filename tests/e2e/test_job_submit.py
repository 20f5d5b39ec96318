"""`ray job submit` of our jobs, from a folder that is not the clone, on a real Ray head."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from modular_lm.data.manifest import Manifest
from modular_lm.tracking.run_folder import RunFolder
from modular_lm.train.inventory import complete_steps, step_folder, verify
from tests.support import REPO, TIMEOUT, TINY, assert_unharmed, end, wait_until

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(600)]


@dataclass
class Submitter:
    """Runs `ray job` as a user would, in a folder of its own with nothing in it."""

    environment: dict[str, str]
    clone: Path
    folder: Path
    running: list[subprocess.Popen[str]] = field(default_factory=list)

    def job(self, *args: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-m", "ray.scripts.scripts", "job", *args],
            cwd=self.folder,
            env=self.environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        self.running.append(process)
        return process

    def submit(self, name: str, module: str, *args: str) -> subprocess.Popen[str]:
        """Submit and follow."""
        return self.job(
            *("submit", f"--submission-id={name}", f"--working-dir={self.clone}"),
            f"--runtime-env={self.clone / 'cluster' / 'runtime_env.yaml'}",
            *("--", sys.executable, "-m", module, *args),
        )

    def details(self, name: str) -> JobDetails:
        return JobSubmissionClient(self.environment["RAY_API_SERVER_ADDRESS"]).get_job_info(name)


def finish(process: subprocess.Popen[str], code: int = 0) -> str:
    output, _ = process.communicate(timeout=TIMEOUT)
    assert process.returncode == code, output[-6000:]
    return output


@pytest.fixture
def submitter(ray_head: dict[str, str], tmp_path: Path) -> Iterator[Submitter]:
    """A clone and an empty folder beside it."""
    clone, folder = tmp_path / "clone", tmp_path / "elsewhere"
    clone.mkdir()
    folder.mkdir()
    for name in ("modular_lm", "ray_jobs", "cluster", "configs"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(REPO / name, clone / name, ignore=ignored)
    for name in ("pyproject.toml", ".gitignore", ".rayignore"):
        shutil.copy2(REPO / name, clone)
    # What the job reads travels; nobody on the cluster knows the submitter's paths.
    shutil.move(clone / "configs" / "debug.yaml", clone / "configs" / "mine.yaml")
    found = Submitter(ray_head, clone, folder)
    yield found
    for process in found.running:
        end(process)


def test_stopped_with_a_complete_checkpoint_then_followed_to_the_end(
    uninterrupted: RunFolder, submitter: Submitter, tmp_path: Path
) -> None:
    folder = RunFolder(tmp_path / "run")
    job = ["ray_jobs.train", "config=configs/mine.yaml", *TINY[1:], f"dump_dir={folder.path}"]
    first = submitter.submit("first", *job)
    wait_until(lambda: len(list(folder.metrics)) > 3 or first.poll() is not None, "some steps")
    assert first.poll() is None, finish(first)
    finish(submitter.job("stop", "first"))
    stopped = finish(first)
    assert submitter.details("first").status == JobStatus.STOPPED
    (step,) = complete_steps(folder.checkpoints)[-1:]
    assert 3 < step < 40
    verify(step_folder(folder.checkpoints, step))
    last = folder.last_event("end")
    assert last is not None
    assert (last["status"], last["step"], last["exit_code"]) == ("stopped", step, 3)
    assert f"stopped at step {step} (SIGTERM); the same command continues" in stopped

    followed = finish(submitter.submit("second", *job))
    assert submitter.details("second").status == JobStatus.SUCCEEDED
    assert f"attempt 2 from step {step}, 2 workers" in followed
    assert "step 40/40  loss " in followed
    assert "\x1b[?25l" not in followed, "the cursor of a progress bar"
    assert "━" not in followed, "a progress bar"
    assert_unharmed(folder, uninterrupted)
    assert (folder.code / "configs" / "mine.yaml").is_file(), "the snapshot is of what travelled"


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["model.dim=33"], "error: model.dim=33: must be divisible by model.n_heads=2"),
        (["dump_dir=runs/mine"], "error: dump_dir=runs/mine: lies in Ray's temporary copy"),
    ],
)
def test_the_reason_of_a_failure_reaches_the_submitter(
    submitter: Submitter, tmp_path: Path, arguments: list[str], reason: str
) -> None:
    folder, name = tmp_path / "run", f"bad-{arguments[0].partition('=')[0]}"
    job = ["config=configs/mine.yaml", *TINY[1:], f"dump_dir={folder}", *arguments]
    output = finish(submitter.submit(name, "ray_jobs.train", *job), code=1)
    details = submitter.details(name)
    assert (details.status, details.driver_exit_code) == (JobStatus.FAILED, 2)
    assert details.message is not None
    assert details.message.splitlines()[-1].startswith(reason)
    assert output.rstrip().splitlines()[-1].startswith(reason)
    assert "Traceback" not in output
    assert not folder.exists()


def test_prepare_is_submitted_like_any_other_job(submitter: Submitter, tmp_path: Path) -> None:
    (tmp_path / "text" / "notes").mkdir(parents=True)
    lines = [json.dumps({"text": f"note {i}: {'words and words ' * 20}"}) for i in range(200)]
    (tmp_path / "text" / "notes" / "part.jsonl").write_text("\n".join(lines))
    arguments = [f"src={tmp_path / 'text'}", f"dst={tmp_path / 'out'}", "val_fraction=0.1"]
    output = finish(submitter.submit("prepare", "ray_jobs.prepare", *arguments))
    manifest = Manifest.load(tmp_path / "out" / "notes")
    assert manifest.train.documents + manifest.val.documents == 200
    assert f"data.root_dir={tmp_path / 'out'}" in output
