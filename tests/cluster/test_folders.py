from __future__ import annotations

import io
import re
from pathlib import Path

import pytest

from cluster import folders
from cluster.checks import Job
from cluster.folders import check_folder, confirm_override, is_ours, remove_run, write_job
from cluster.options import LaunchConfig
from cluster.plan import JobPlan
from cluster.script import plan_file
from modular_lm.errors import ConfigError
from modular_lm.files import lock
from modular_lm.tracking.run_folder import RunFolder
from modular_lm.train.inventory import COMPLETE, step_folder

FOREIGN = "notes.txt"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A folder as a submission leaves it, with a checkpoint and a file of somebody else."""
    folder = tmp_path / "run"
    job = Job("ray_jobs.train", {"steps": 3}, folder, "run")
    plan = JobPlan(job.script, [], str(folder), str(folder / "code"), nodes=1, cpus_per_node=1)
    write_job(job, plan)
    checkpoint = step_folder(RunFolder(folder).checkpoints, 20)
    checkpoint.mkdir(parents=True)
    (checkpoint / COMPLETE).touch()
    for left in ("sweep.yaml", "trials/a/trial.json", "dumps/0/x.json", "pictures/a.svg"):
        (folder / left).parent.mkdir(parents=True, exist_ok=True)
        (folder / left).touch()
    (folder / FOREIGN).write_text("mine")
    return folder


def test_what_a_job_needs_is_in_its_folder(run: Path) -> None:
    assert RunFolder(run).base_config.read_text() == "steps: 3\n"
    assert JobPlan.read(plan_file(run)).dump_dir == str(run)
    assert (run / "code" / "cluster" / "plan.py").is_file()
    assert (run / "code" / "cluster" / "sites" / "generic.yaml").is_file()


def test_new_and_empty_folders_and_runs_of_ours_can_be_used(tmp_path: Path, run: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name in ("new", "empty", "run"):
        check_folder(tmp_path / name, LaunchConfig())


def test_folders_of_others_are_refused_unless_they_may_be_used(tmp_path: Path) -> None:
    folder = tmp_path / "theirs"
    folder.mkdir()
    (folder / FOREIGN).touch()
    with pytest.raises(ConfigError, match=re.escape("holds notes.txt and no run of ours")):
        check_folder(folder, LaunchConfig())
    check_folder(folder, LaunchConfig(dirs_exists_ok=True))
    with pytest.raises(ConfigError, match="is a file"):
        check_folder(folder / FOREIGN, LaunchConfig(dirs_exists_ok=True))


def test_only_what_a_run_made_is_deleted(run: Path) -> None:
    remove_run(run)
    assert [p.name for p in run.iterdir()] == [FOREIGN]
    remove_run(run)
    assert (run / FOREIGN).read_text() == "mine"


def test_a_folder_that_is_empty_then_goes_too(run: Path) -> None:
    (run / FOREIGN).unlink()
    remove_run(run)
    assert not run.exists()


def test_a_folder_without_a_run_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    assert not is_ours(tmp_path)
    remove_run(tmp_path)
    assert (tmp_path / "logs").is_dir()


@pytest.mark.parametrize("name", ["driver.lock", "sweep.lock"])
def test_a_run_that_is_training_is_not_deleted(run: Path, name: str) -> None:
    with lock(run / "ray" / name):
        with pytest.raises(ConfigError, match="is being trained by process"):
            remove_run(run)
        assert (run / "code").is_dir()


def test_folders_that_a_failed_launch_left_empty_can_be_used(tmp_path: Path) -> None:
    RunFolder(tmp_path / "run").create()
    check_folder(tmp_path / "run", LaunchConfig())
    (tmp_path / "run" / "logs" / "x").touch()
    with pytest.raises(ConfigError, match="holds logs/x and no run of ours"):
        check_folder(tmp_path / "run", LaunchConfig())


def test_what_fails_after_the_plan_leaves_a_folder_of_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(destination: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(folders, "snapshot_code", interrupted)
    job = Job("ray_jobs.train", {}, tmp_path / "run", "run")
    with pytest.raises(KeyboardInterrupt):
        write_job(job, JobPlan(job.script, [], "", "", nodes=1, cpus_per_node=1))
    check_folder(job.dump_dir, LaunchConfig())
    assert is_ours(job.dump_dir)


def test_deleting_is_asked_for(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"the latest of step 20\); add yes=true"):
        confirm_override(run, LaunchConfig())
    confirm_override(run, LaunchConfig(yes=True))
    terminal = io.StringIO()
    terminal.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr("sys.stdin", terminal)
    for answer, agreed in (("yes", True), ("no", False), ("", False)):
        monkeypatch.setattr("builtins.input", lambda _, a=answer: a)
        if agreed:
            confirm_override(run, LaunchConfig())
        else:
            with pytest.raises(ConfigError, match="nothing was deleted"):
                confirm_override(run, LaunchConfig())


def test_a_folder_that_cannot_be_made_is_the_users_mistake() -> None:
    job = Job("ray_jobs.train", {}, Path("/proc/x"), "run")
    plan = JobPlan(job.script, [], "/proc/x", "", nodes=1, cpus_per_node=1)
    with pytest.raises(ConfigError, match="dump_dir=/proc/x: cannot be made"):
        write_job(job, plan)
