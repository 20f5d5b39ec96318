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

from cluster import folders
from cluster.checks import Job
from cluster.jobs import active_job, ending, record_job, sbatch_environment, submit, try_script
from cluster.launch import Launch, prepare
from cluster.options import LaunchConfig
from cluster.plan import JobPlan
from cluster.script import batch_script, plan_file
from cluster.sites import NodeSetup
from cluster.slurm import _again, _show, launch_job, launch_jobs, main, submit_launch
from cluster.summary import summary
from modular_lm.errors import ConfigError, RunFailedError
from modular_lm.files import lock
from modular_lm.tracking.run_folder import RunFolder
from modular_lm.train.inventory import COMPLETE, step_folder
from modular_lm.train.ownership import OWNER
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


@pytest.mark.parametrize(
    ("options", "args", "message"),
    [
        ({"configs": ["a", "b"]}, ["config=c"], "config=c and configs=a,b: use one of them"),
        ({}, ["steps=3"], "config: ray_jobs.train needs one; give config=FILE or configs=["),
        ({"script": "ray_jobs.sweep"}, [], "config: ray_jobs.sweep needs one"),
        ({"script": "ray_jobs.prepare"}, [], "dump_dir: ray_jobs.prepare has none"),
        ({"array_limit": 2}, [f"config={DEBUG}"], "are for a job array: configs=[...]"),
    ],
)
def test_the_config_is_given_in_one_way(
    options: dict[str, object], args: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        main(LaunchConfig(**options), args)  # type: ignore[arg-type]


def test_mistakes_in_calls_from_python_are_named() -> None:
    for overrides, message in (
        ("steps=3", "overrides='steps=3': expected a list: ['steps=3']"),
        (["nodes=2"], "nodes=2: is an option of the launcher; give it as a keyword argument"),
        (["config=x"], "config=x: the config is the first argument"),
    ):
        with pytest.raises(ConfigError, match=re.escape(message)):
            launch_job(DEBUG, overrides)
    for configs in ([], str(DEBUG), {"steps": 3}):
        with pytest.raises(ConfigError, match="expected a list of at least one config"):
            launch_jobs(configs)  # type: ignore[arg-type]


def test_inside_an_allocation_the_job_gets_what_that_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    asked = LaunchConfig(launcher="bash"), [[f"config={DEBUG}"]], lambda _: []
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    with pytest.raises(ConfigError, match="launcher=bash: this is no allocation"):
        prepare(*asked, is_array=False)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "3")
    monkeypatch.setenv("SLURM_JOB_CPUS_PER_NODE", "8(x2),4")
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "2")
    launch = prepare(*asked, is_array=False)
    assert (launch.options.nodes, launch.options.cpus_per_node) == (3, 4)
    assert (launch.options.gpus_per_node, launch.options.requeue) == (2, False)
    with pytest.raises(ConfigError, match="nodes=2: the allocation has 3"):
        prepare(LaunchConfig(launcher="bash", nodes=2), *asked[1:], is_array=False)


@pytest.fixture
def allocation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """This process is inside a job of SLURM, in `tmp_path`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SLURM_JOB_ID", "7")


def launch_into(folder: str, **options: object) -> Launch:
    c = LaunchConfig(launcher="bash", cpus_per_node=4, **options)  # type: ignore[arg-type]
    return prepare(c, [[f"config={DEBUG}", f"dump_dir={folder}"]], lambda _: [], is_array=False)


@pytest.mark.usefixtures("allocation")
def test_a_full_disk_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(destination: Path) -> None:
        raise RunFailedError("no space")

    monkeypatch.setattr(folders, "snapshot_code", full)
    with pytest.raises(RunFailedError, match="no space"):
        submit_launch(launch_into("x"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("allocation")
def test_a_run_that_slurm_knows_nothing_of_is_left_alone(tmp_path: Path) -> None:
    launch = launch_into("x")
    with (
        lock(tmp_path / "x" / "ray" / "driver.lock"),
        pytest.raises(ConfigError, match="is being trained by process"),
    ):
        submit_launch(launch)
    assert not (tmp_path / "x" / "code").exists()


@pytest.mark.usefixtures("allocation")
@pytest.mark.parametrize(
    ("argument", "message"),
    [("name=a\nb", "name='a\\nb': holds a control"), ("dump_dir=file/x", "file is a file")],
)
def test_names_and_folders_that_cannot_be_are_refused(
    tmp_path: Path, argument: str, message: str
) -> None:
    (tmp_path / "file").touch()
    c = LaunchConfig(launcher="bash", cpus_per_node=4)
    request = [f"config={DEBUG}", "dump_dir=x", argument]
    with pytest.raises(ConfigError, match=re.escape(message)):
        prepare(c, [request], lambda _: [], is_array=False)


@pytest.mark.usefixtures("allocation")
def test_a_folder_that_may_not_be_written_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.access", lambda path, mode: False)
    with pytest.raises(ConfigError, match=re.escape(f"{tmp_path} cannot be written")):
        launch_into("a/b")


@pytest.mark.usefixtures("allocation")
def test_ports_that_are_too_few_are_the_profiles_mistake(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("port_range: [20000, 20010]\n")
    with pytest.raises(ConfigError, match=r"^port_range=\[20000, 20010\]: a node of 4 CPUs needs"):
        launch_into("x", site="./mine.yaml")


def test_each_of_several_configs_needs_a_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    files = [tmp_path / "a.yaml", tmp_path / "b.yaml"]
    for file, name in zip(files, ("name: a", "steps: 3"), strict=True):
        file.write_text(f"{name}\ndata: {{batch_size: 1}}\n")
    c = LaunchConfig(dry_run=True, cpus_per_node=4)
    asked = [[f"config={file}", "data.sources={builtin: 1}"] for file in files]
    with pytest.raises(ConfigError, match="configs: number 2 has neither name nor dump_dir"):
        prepare(c, asked, lambda _: [], is_array=True)


def test_a_dry_run_says_what_an_override_would_delete(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = Job("ray_jobs.train", {}, tmp_path / "x", "x")
    plan = JobPlan(job.script, [], str(job.dump_dir), "", nodes=1, cpus_per_node=1)
    plan.write(plan_file(job.dump_dir))
    _show(Launch(LaunchConfig(override=True, dry_run=True), NodeSetup(), [job], [job]))
    assert f"would delete the run in {tmp_path}/x (no checkpoint)" in capsys.readouterr().err


@pytest.mark.usefixtures("allocation")
def test_the_command_that_resumes_deletes_nothing(tmp_path: Path) -> None:
    launch = launch_into("x", override=True)
    command = _again(launch.jobs, {"override": True, "yes": True, "nodes": 2})
    assert command == [f"config={tmp_path}/x/base_config.yaml", "nodes=2"]
    said = summary(launch.options, launch.jobs, ["8"], None)
    assert "resume      the same command without override=true, when" in said


@pytest.mark.usefixtures("allocation")
def test_checkpoints_in_a_place_of_their_own_stop_an_override(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(f"dump_dir: x\ncheckpoint: {{path: {tmp_path}/saved}}\n")
    c = LaunchConfig(launcher="bash", cpus_per_node=4, override=True)
    asked = c, [[f"config={file}"]], lambda _: []
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / OWNER).write_text(f'{{"uid": "u", "dump_dir": "{tmp_path}/x"}}')
    prepare(*asked, is_array=False)
    step_folder(tmp_path / "saved", 3).mkdir()
    (step_folder(tmp_path / "saved", 3) / COMPLETE).touch()
    with pytest.raises(ConfigError, match="override=true: deletes nothing in"):
        prepare(*asked, is_array=False)


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
