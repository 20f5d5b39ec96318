"""Jobs from the command to their end on a real SLURM of two nodes: checked, submitted, resumed.

What the allocation does with signals and lost nodes is tested beside it.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from modular_lm.sweep.folder import SweepFolder
from modular_lm.tracking.run_folder import RunFolder
from modular_lm.train.inventory import complete_steps
from tests.slurm import NODES, Slurm
from tests.support import REPO, TIMEOUT, TINY, losses

pytestmark = [pytest.mark.e2e, pytest.mark.slurm, pytest.mark.slow]

STEPS = 40
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")


@pytest.fixture
def slurm_alone(slurm: Slurm, cache: Path) -> Iterator[Slurm]:
    """The session's SLURM, with the prepared corpus in reach; no job and no process is left."""
    yield slurm
    slurm.cancel_all()
    assert slurm.processes() == []


def launch(slurm: Slurm, cache: Path, *args: str, code: int = 0) -> str:
    """The command as users type it; returns what it printed."""
    done = subprocess.run(
        [sys.executable, "-m", "cluster.slurm", *args],
        cwd=REPO,
        env={**slurm.environment, "MODULAR_LM_CACHE": str(cache)},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=TIMEOUT,
    )
    assert done.returncode == code, done.stdout
    return done.stdout


def wait(slurm: Slurm, job: str, folder: Path) -> RunFolder:
    """Wait for the job's end; the run that it has completed."""
    state = slurm.wait(job, *ENDED)
    log = (folder / "logs" / f"slurm-{job}.out").read_text()
    assert state == "COMPLETED", log[-6000:]
    return RunFolder(folder)


def test_from_the_command_to_the_end_on_two_nodes(
    slurm_alone: Slurm, cache: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "a run"
    # Of three CPUs a node has room for one worker of two, and for what feeds it.
    command = [*TINY, "nodes=2", "time=10", "signal_s=60", f"dump_dir={folder}"]
    command += ["ray.cpus_per_worker=2", "cpus_per_node=3"]

    refused = launch(slurm_alone, cache, *command, "partition=mian", code=2)
    assert "did you mean main?" in refused
    refused = launch(slurm_alone, cache, *command, "model.n_heads=5", code=2)
    assert "error: model.dim=32: must be divisible" in refused
    assert not folder.exists()

    said = launch(slurm_alone, cache, *command)
    job = re.findall(r"^job (\d+): debug_modular$", said, re.MULTILINE)[0]
    assert f"{folder}/logs/slurm-{job}.out" in said
    run = wait(slurm_alone, job, folder)
    assert complete_steps(run.checkpoints)[-1] == STEPS
    assert set(losses(run)) == set(range(1, STEPS + 1))
    attempt, end = run.last_event("attempt"), run.last_event("end")
    assert attempt is not None
    assert attempt["world_size"] == 2
    assert end is not None
    assert end["status"] == "done"
    assert all((run.logs / "ray" / node).is_dir() for node in NODES)

    assert "is complete" in launch(slurm_alone, cache, *command)
    assert slurm_alone.run("squeue", "--noheader") == ""


@pytest.mark.chaos
def test_an_array_and_an_allocation_of_ones_own(
    slurm_alone: Slurm, cache: Path, tmp_path: Path
) -> None:
    """A task for each config, and launcher=bash, side by side on the same hosts."""
    small = [*TINY[1:], "steps=10", "ray.num_workers=1", "time=10", "signal_s=60"]
    debug = yaml.safe_load((REPO / "configs" / "debug.yaml").read_text())
    configs = {name: tmp_path / f"{name}.yaml" for name in ("a", "b")}
    for name, file in configs.items():
        file.write_text(yaml.safe_dump({**debug, "name": name, "dump_dir": f"{tmp_path}/{name}"}))

    inside = [sys.executable, "-m", "cluster.slurm", TINY[0], *small, "launcher=bash"]
    mine = slurm_alone.run(
        *(
            "sbatch",
            "--parsable",
            "--nodes=1",
            "--cpus-per-task=3",
            f"--output={tmp_path}/mine.out",
        ),
        *("--chdir", str(REPO), f"--export=ALL,MODULAR_LM_CACHE={cache}"),
        *("--wrap", f"exec {shlex.join([*inside, f'dump_dir={tmp_path}/mine'])}"),
    ).strip()
    listed = ",".join(map(str, configs.values()))
    said = launch(slurm_alone, cache, f"configs=[{listed}]", *small)

    tasks = re.findall(r"^job (\d+_\d): (\w)$", said, re.MULTILINE)
    assert [name for _, name in tasks] == ["a", "b"]
    for job, name in tasks:
        run = wait(slurm_alone, job, tmp_path / name)
        assert complete_steps(run.checkpoints) == [10]
    assert slurm_alone.wait(mine, *ENDED) == "COMPLETED", (tmp_path / "mine.out").read_text()
    assert complete_steps(RunFolder(tmp_path / "mine").checkpoints) == [10]


@pytest.mark.chaos
def test_the_trials_of_a_sweep_run_on_both_nodes(
    slurm_alone: Slurm, cache: Path, tmp_path: Path
) -> None:
    sweep = SweepFolder(tmp_path / "sweep")
    small = [
        "sweep.seeds=[0]",
        "sweep.budget=steps",
        *(a for a in TINY[1:] if "agg" not in a and "module" not in a),
    ]
    said = launch(
        slurm_alone, cache, "script=ray_jobs.sweep", "config=configs/ablation_debug.yaml", *small,
        "ray.cpus_per_worker=2", "nodes=2", "cpus_per_node=3", "time=10", "signal_s=60",
        f"dump_dir={sweep.path}",
    )  # fmt: skip
    job = re.findall(r"^job (\d+): ", said, re.MULTILINE)[0]
    wait(slurm_alone, job, sweep.path)
    assert {trial["status"] for trial in sweep.trials()} == {"done"}
    attempts = [sweep.run(trial["name"]).last_event("attempt") for trial in sweep.trials()]
    assert len({str(attempt["addresses"]) for attempt in attempts if attempt}) == 2
    assert sweep.report("html").is_file()
