"""The text of batch scripts, run by bash; tests/cluster/test_jobs.py has SLURM read it."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cluster.options import LaunchConfig
from cluster.script import (
    batch_script,
    check_container,
    check_name,
    check_path,
    expandable,
    on_nodes,
)
from cluster.sites import NodeSetup
from modular_lm.errors import ConfigError

AWKWARD = "a 'b' \"c\" $HOME `d` %j #e é"
# In place of a container: says what it is asked to run.
SHOW = "printf '%s\\n'"


def script(*folders: Path, array_dir: Path | None = None, **options: object) -> str:
    setup = options.pop("setup", NodeSetup())
    assert isinstance(setup, NodeSetup)
    c = LaunchConfig(cpus_per_node=4, **options)  # type: ignore[arg-type]
    return batch_script(c, folders, command="x", name="run", setup=setup, array_dir=array_dir)


def run(text: str, **environment: str) -> list[str]:
    """The lines that bash prints."""
    done = subprocess.run(
        ["bash"],
        input=text,
        env={"PATH": "/usr/bin:/bin", **environment},
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    return done.stdout.splitlines()


def options_of(text: str) -> list[str]:
    return re.findall(r"^#SBATCH (.*)$", text, re.MULTILINE)


def test_all_options_are_in_the_script(tmp_path: Path) -> None:
    text = script(
        tmp_path,
        nodes=2,
        gpus_per_node=4,
        mem="64G",
        time="2:00:00",
        account="xyz@h100",
        qos="dev",
        partition="gpu",
        constraint="h100",
        exclude="n[3-4]",
        signal_s=120,
        sbatch_options=["--hint=nomultithread"],
    )
    assert options_of(text) == [
        "--job-name=run",
        "--nodes=2",
        "--ntasks-per-node=1",
        "--cpus-per-task=4",
        "--gres=gpu:4",
        "--mem=64G",
        "--time=2:00:00",
        "--account=xyz@h100",
        "--qos=dev",
        "--partition=gpu",
        "--constraint=h100",
        "--exclude=n[3-4]",
        f"--output={tmp_path}/logs/slurm-%j.out",
        "--open-mode=append",
        "--signal=B:USR1@120",
        "--requeue",
        "--hint=nomultithread",
    ]


def test_what_is_not_given_is_left_to_slurm(tmp_path: Path) -> None:
    named = {option.partition("=")[0] for option in options_of(script(tmp_path, requeue=False))}
    assert named == {
        *("--job-name", "--nodes", "--ntasks-per-node", "--cpus-per-task", "--output"),
        *("--open-mode", "--signal", "--no-requeue"),
    }


def test_without_an_environment_the_present_interpreter_runs(tmp_path: Path) -> None:
    last = script(tmp_path).splitlines()[-1]
    assert last.startswith(f"exec {sys.executable} -m cluster.allocation ")
    # Modules of the site alone bring no interpreter.
    setup = NodeSetup(modules=("arch/h100",))
    assert script(tmp_path, setup=setup).splitlines()[-1] == last
    assert script(tmp_path, module_load=["pytorch"]).splitlines()[-1].startswith("exec python -m")


def test_awkward_paths_reach_the_allocation_unharmed(tmp_path: Path) -> None:
    folder = tmp_path / AWKWARD
    (folder / "code").mkdir(parents=True)
    lines = run(script(folder, container=SHOW))
    assert lines == ["python3", "-m", "cluster.allocation", f"{folder}/ray/slurm/plan.json"]


def test_the_environment_is_set_up_in_order_and_expanded_on_the_node(tmp_path: Path) -> None:
    (tmp_path / "code").mkdir()
    venv = tmp_path / "my env" / "bin"
    venv.mkdir(parents=True)
    (venv / "activate").write_text("module activate\n")
    setup = NodeSetup(("arch/x",), True, {"A": '$WORK/"a" b', "B": "$(touch x)"})
    text = script(
        tmp_path, venv="$ROOT/my env", module_load=["m"], setup=setup,
        container="bash -c 'printf \"%s\\n\" \"$A\" \"$B\" \"$PWD\"'",
    )  # fmt: skip
    text = text.replace("module purge", 'module() { echo "$@"; }\nmodule purge')
    assert run(text, WORK="/w k", ROOT=str(tmp_path)) == [
        *("purge", "load arch/x", "load m", "activate"),
        *('/w k/"a" b', "$(touch x)", f"{tmp_path}/code"),
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"module_load": ["m"], "container": SHOW}, "module_load=m: cannot be loaded"),
        ({"conda": "it's"}, "conda=it's: there is no conda command here"),
        ({"venv": "$NOPE/v"}, "venv=$NOPE/v: holds no bin/activate"),
        (
            {"container": "nosuch exec 'my image'"},
            "container=nosuch exec 'my image': there is no command nosuch here",
        ),
    ],
)
def test_an_environment_that_cannot_be_set_up_ends_the_job(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    (tmp_path / "code").mkdir()
    text = script(tmp_path, **options)
    done = subprocess.run(
        ["/bin/bash"], input=text, env={"PATH": "/usr/bin:/bin"}, capture_output=True, text=True,
        timeout=30,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines()[-1].startswith(f"error: {message}")


def test_an_environment_of_conda_that_is_not_there_ends_the_job(tmp_path: Path) -> None:
    (tmp_path / "conda").write_text("#!/bin/bash\necho 'conda() { return 1; }'\n")
    (tmp_path / "conda").chmod(0o755)
    done = subprocess.run(
        ["/bin/bash"], input=script(tmp_path, conda="e"), env={"PATH": f"{tmp_path}:/usr/bin:/bin"},
        capture_output=True, text=True, timeout=30,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (2, "error: conda=e: cannot be activated\n")


def test_a_container_whose_command_is_not_here_is_warned_of(
    caplog: pytest.LogCaptureFixture,
) -> None:
    for container in ("printf x", "$APPTAINER exec i.sif"):
        check_container(LaunchConfig(container=container), NodeSetup())
    check_container(LaunchConfig(container="nosuch exec x"), NodeSetup(modules=("nosuch",)))
    assert caplog.messages == []
    check_container(LaunchConfig(container="nosuch exec x"), NodeSetup())
    assert caplog.messages == ["container=nosuch exec x: there is no command nosuch here"]
    with pytest.raises(ConfigError, match="container=x 'y: No closing quotation"):
        check_container(LaunchConfig(container="x 'y"), NodeSetup())


def test_a_task_of_an_array_finds_its_folder(tmp_path: Path) -> None:
    folders = [tmp_path / "a", tmp_path / AWKWARD]
    for folder in folders:
        (folder / "code").mkdir(parents=True)
        (folder / "logs").mkdir()
    text = script(*folders, array_dir=tmp_path / "array", array_limit=1, container=SHOW)
    assert "--array=0-1%1" in options_of(text)
    for task, folder in enumerate(folders):
        run(text, SLURM_ARRAY_TASK_ID=str(task), SLURM_ARRAY_JOB_ID="7")
        log = (folder / "logs" / f"slurm-7_{task}.out").read_text()
        assert log.splitlines()[-1] == f"{folder}/ray/slurm/plan.json"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain", "plain"),
        ("$A/b", "1 2/b"),
        ("${A}b", "1 2b"),
        ('x "$A" `id` \\ $(id) $', 'x "1 2" `id` \\ $(id) $'),
    ],
)
def test_only_variables_are_expanded(text: str, shown: str) -> None:
    assert run(f"echo {expandable(text)}", A="1 2") == [shown]


def test_the_home_folder_is_filled_in_and_a_mistyped_environment_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "my home"))
    venv = tmp_path / "my home" / "env"
    (venv / "bin").mkdir(parents=True)
    with pytest.raises(ConfigError, match=re.escape(f"venv={venv}: holds no bin/activate")):
        on_nodes(LaunchConfig(venv="~/env"))
    (venv / "bin" / "activate").touch()
    container = "run --bind=a~b ~/x.sif ~"
    options = on_nodes(LaunchConfig(venv="~/env", container=container))
    assert options.venv == str(venv)
    home = tmp_path / "my home"
    assert options.container is not None
    assert shlex.split(options.container) == ["run", "--bind=a~b", f"{home}/x.sif", str(home)]
    assert on_nodes(LaunchConfig(venv="$WORK/env")).venv == "$WORK/env"


def test_a_name_stays_on_its_line() -> None:
    check_name(AWKWARD)
    with pytest.raises(ConfigError, match="holds a control character"):
        check_name("x\nrm -r y")


@pytest.mark.parametrize("name", ["a\\b", "a:b", "a\nb"])
def test_names_that_slurm_or_python_cannot_hold_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="dump_dir="):
        check_path(Path("/x") / name, "dump_dir")
