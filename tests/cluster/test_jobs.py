"""What the launcher asks of SLURM, asked of a real one; no Ray starts here.

In place of a container the jobs get a command that shows, or waits for, what it is to run.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.checks import Job
from cluster.jobs import active_job, ending, record_job, sbatch_environment, submit, try_script
from cluster.launch import prepare
from cluster.options import LaunchConfig
from cluster.plan import JobPlan
from cluster.script import batch_script, plan_file
from cluster.sites import NodeSetup
from cluster.slurm import launch_job, launch_jobs, submit_launch
from cluster.summary import summary
from modular_lm.errors import ConfigError, RunFailedError
from modular_lm.tracking.run_folder import RunFolder
from tests.cluster.test_script import AWKWARD
from tests.slurm import Slurm
from tests.support import REPO

SHOW = "printf '%s\\n'"
WAIT = "sleep 600; true"
DEBUG = REPO / "configs" / "debug.yaml"


def test_variables_that_would_win_over_options_do_not_reach_sbatch() -> None:
    outer = {
        "SBATCH_ACCOUNT": "theirs",
        "SBATCH_QOS": "mine",
        "SBATCH_OUTPUT": "x",
        "SBATCH_RESERVATION": "r",
        "SLURM_CONF": "/c",
        "SLURM_CPUS_PER_TASK": "7",
        "RAY_ADDRESS": "x",
        "HOME": "/h",
    }
    assert sbatch_environment(LaunchConfig(account="ours"), outer) == {
        "SBATCH_QOS": "mine",
        "SBATCH_RESERVATION": "r",
        "SLURM_CONF": "/c",
        "HOME": "/h",
    }


def test_jobs_are_ended_in_the_way_that_their_state_allows() -> None:
    gently = "scancel --batch --signal=TERM 8_0 8_1"
    for state in ("RUNNING", "SIGNALING", "SUSPENDED"):
        assert ending(["8_0", "8_1"], state) == gently
    assert ending(["8_0", "8_1"], "PENDING") == "scancel 8_0 8_1"
    assert ending(["8"], "COMPLETING") == ""


def test_the_summary_says_what_each_task_gets_and_how_to_end_it(tmp_path: Path) -> None:
    jobs = [Job("ray_jobs.train", {}, tmp_path / name, name, (1, 2)) for name in "ab"]
    options = LaunchConfig(nodes=2, cpus_per_node=3, time="30")
    said = summary(options, jobs, ["8_0", "8_1"], tmp_path / "array_a")
    asked = "2 nodes of 3 CPUs; 1 to 2 workers; time limit 30; each of 2 tasks"
    assert f"  asked for   {asked}\n" in said
    assert "  stop        scancel --batch --signal=TERM 8_0 8_1   (saves a checkpoint)\n" in said
    assert "              scancel 8_0 8_1   (while it is pending)\n" in said


@pytest.fixture
def here(slurm: Slurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Slurm]:
    """The session's SLURM for this process, which then works in `tmp_path`; no job is left."""
    monkeypatch.setenv("SLURM_CONF", slurm.environment["SLURM_CONF"])
    monkeypatch.chdir(tmp_path)
    yield slurm
    slurm.cancel_all()


def script(folder: Path, **options: object) -> tuple[str, LaunchConfig]:
    c = LaunchConfig(cpus_per_node=1, container=SHOW, **options)  # type: ignore[arg-type]
    return batch_script(c, [folder], command="x", name="a name", setup=NodeSetup()), c


@pytest.mark.slurm
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"partition": "mian"}, "(partition=mian: did you mean main?)"),
        ({"nodes": 3}, "SLURM refuses the job"),
        ({"cpus_per_node": 900}, "SLURM refuses the job"),
        ({"nodes": 2, "gpus_per_node": 1}, "SLURM refuses the job"),
        ({"mem": "9T"}, "SLURM refuses the job"),
        ({"time": "50-0"}, "SLURM refuses the job"),
        ({"exclude": "n9"}, "SLURM refuses the job"),
        ({"sbatch_options": ["--resrevation=x"]}, "resrevation"),
    ],
)
def test_options_that_slurm_refuses_leave_nothing_behind(
    here: Slurm, tmp_path: Path, options: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)) as raised:
        launch_job(DEBUG, dump_dir_of("x"), **options)
    assert "\n" not in str(raised.value)
    assert list(tmp_path.iterdir()) == []


def dump_dir_of(name: str) -> list[str]:
    return [f"dump_dir={name}"]


@pytest.mark.slurm
def test_slurm_reads_awkward_paths_as_they_are(here: Slurm, tmp_path: Path) -> None:
    folder = tmp_path / AWKWARD
    for name in ("code", "logs"):
        (folder / name).mkdir(parents=True)
    text, options = script(folder)
    assert "to start at" in try_script(text, options)
    file = tmp_path / "submit.slurm"
    file.write_text(text)
    job = submit(file, options)
    assert here.wait(job, "COMPLETED", "FAILED", timeout=60) == "COMPLETED"
    log = (folder / "logs" / f"slurm-{job}.out").read_text()
    assert log.splitlines()[-1] == str(plan_file(folder))


@pytest.mark.slurm
def test_a_job_is_active_until_it_has_ended(here: Slurm, tmp_path: Path) -> None:
    job = launch_job(DEBUG, dump_dir_of("x"), nodes=2, container=WAIT)
    folder = tmp_path / "x"
    assert job is not None
    active = active_job(folder)
    assert active is not None
    assert active.job_id == job
    here.wait(job, "RUNNING", timeout=60)
    end = f"RUNNING; wait for it, or end it: scancel --batch --signal=TERM {job}$"
    with pytest.raises(ConfigError, match=f"job {job} is there already, {end}"):
        launch_job(DEBUG, dump_dir_of("x"), container=SHOW)
    with pytest.raises(ConfigError, match=f"job {job} is there already"):
        launch_job(DEBUG, dump_dir_of("x"), container=SHOW, override=True, yes=True)
    here.cancel_all()
    assert active_job(folder) is None
    record_job(folder, "999999")
    assert active_job(folder) is None


@pytest.mark.slurm
def test_a_job_is_submitted_from_python(here: Slurm, tmp_path: Path) -> None:
    job = launch_job({"name": "small", "ray": {"num_workers": 2}}, ["steps=9"], nodes=2,
                     container=SHOW)  # fmt: skip
    assert job is not None
    assert here.wait(job, "COMPLETED", "FAILED", timeout=60) == "COMPLETED"
    folder = RunFolder(tmp_path / "runs" / "small")
    plan = JobPlan.read(plan_file(folder.path))
    assert (plan.nodes, plan.cpus_per_node, plan.gpus_per_node) == (2, 3, 0)
    assert plan.arguments == [f"config={folder.base_config}"]
    assert "steps: 9" in folder.base_config.read_text()
    again = f"python -m cluster.slurm config={folder.base_config} nodes=2 "
    assert again in (folder.path / "submit.slurm").read_text()
    log = (folder.logs / f"slurm-{job}.out").read_text()
    assert log.splitlines()[-1] == str(plan_file(folder.path))
    with pytest.raises(ConfigError, match="unknown key nodez: did you mean nodes"):
        launch_job(DEBUG, nodez=2)


@pytest.mark.slurm
def test_override_begins_anew_and_keeps_what_is_not_ours(here: Slurm, tmp_path: Path) -> None:
    first = launch_job(DEBUG, dump_dir_of("x"), container=SHOW)
    assert first is not None
    here.wait(first, "COMPLETED", timeout=60)
    folder = tmp_path / "x"
    (folder / "mine").touch()
    (folder / "metrics.jsonl").touch()
    with pytest.raises(ConfigError, match="add yes=true"):
        launch_job(DEBUG, dump_dir_of("x"), container=SHOW, override=True)
    assert (folder / "metrics.jsonl").exists()
    second = launch_job(DEBUG, dump_dir_of("x"), container=SHOW, override=True, yes=True)
    assert second is not None
    here.wait(second, "COMPLETED", timeout=60)
    assert (folder / "mine").exists()
    assert not (folder / "metrics.jsonl").exists()
    assert [p.name for p in (folder / "logs").iterdir()] == [f"slurm-{second}.out"]


@pytest.mark.slurm
def test_an_array_has_a_task_for_each_config(here: Slurm, tmp_path: Path) -> None:
    names = ["a", "b"]
    jobs = launch_jobs([{"name": name} for name in names], container=SHOW, array_limit=1)
    for task, (name, job) in enumerate(zip(names, jobs, strict=True)):
        assert job is not None
        assert job.endswith(f"_{task}")
        assert here.wait(job, "COMPLETED", "FAILED", timeout=60) == "COMPLETED"
        folder = tmp_path / "runs" / name
        log = (folder / "logs" / f"slurm-{job}.out").read_text()
        assert log.splitlines()[-1] == str(plan_file(folder))
    assert (tmp_path / "runs" / "array_a" / "submit.slurm").is_file()
    with pytest.raises(ConfigError, match="two of the configs have it"):
        launch_jobs([{"name": "a"}, {"name": "a"}])


@pytest.mark.slurm
def test_an_array_is_submitted_again_without_the_tasks_that_are_there(
    here: Slurm, tmp_path: Path
) -> None:
    waiting = launch_job({"name": "c"}, container=WAIT)
    names = ("a", "c")
    new, there = launch_jobs([{"name": name} for name in names], container=SHOW)
    assert there == waiting
    assert new is not None
    assert here.wait(new, "COMPLETED", "FAILED", timeout=60) == "COMPLETED"
    script_text = (tmp_path / "runs" / "array_a" / "submit.slurm").read_text()
    assert "--array=0-0\n" in script_text
    with pytest.raises(ConfigError, match=f"job {waiting} is there already"):
        launch_jobs([{"name": "c"}], container=SHOW)
    with pytest.raises(ConfigError, match=f"job {waiting} is there already"):
        launch_jobs([{"name": n} for n in names], container=SHOW, override=True, yes=True)


@pytest.mark.slurm
def test_dry_run_prints_the_script_and_writes_nothing(here: Slurm, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "cluster.slurm", f"config={DEBUG}", "nodes=2", "dry_run=true"]
    done = subprocess.run(
        [*command, f"dump_dir={tmp_path}/x"], cwd=REPO, env=here.environment, text=True,
        capture_output=True, timeout=60, check=True,
    )  # fmt: skip
    assert done.stdout.startswith("#!/bin/bash\n")
    assert "dry_run=true" not in done.stdout
    assert subprocess.run(["bash", "-n"], input=done.stdout, text=True).returncode == 0
    assert "not submitted: debug_modular" in done.stderr
    assert "to start at" in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slurm
def test_a_submission_that_fails_after_all_leaves_nothing(here: Slurm, tmp_path: Path) -> None:
    launch = prepare(
        LaunchConfig(), [[f"config={DEBUG}", "dump_dir=x"]], lambda _: [], is_array=False
    )
    # Between the trial and the submission the partition is closed.
    here.run("scontrol", "update", "PartitionName=main", "State=INACTIVE")
    try:
        with pytest.raises(RunFailedError, match="SLURM did not take the job"):
            submit_launch(launch)
    finally:
        here.run("scontrol", "update", "PartitionName=main", "State=UP")
    assert list(tmp_path.iterdir()) == []
