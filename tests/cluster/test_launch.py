"""What is refused before anything is written, and what a launch leaves; no SLURM is needed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from cluster import folders
from cluster.checks import Job
from cluster.launch import Launch, prepare
from cluster.options import LaunchConfig
from cluster.plan import JobPlan
from cluster.script import plan_file
from cluster.sites import NodeSetup
from cluster.slurm import _again, _show, launch_job, launch_jobs, main, submit_launch
from cluster.summary import summary
from modular_lm.errors import ConfigError, RunFailedError
from modular_lm.files import lock
from modular_lm.train.inventory import COMPLETE, step_folder
from modular_lm.train.ownership import OWNER
from tests.support import REPO

DEBUG = REPO / "configs" / "debug.yaml"


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
