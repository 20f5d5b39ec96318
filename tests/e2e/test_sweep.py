"""`python -m ray_jobs.sweep` on a real Ray: complete, interrupted, with bad trials."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from modular_lm.sweep.folder import SweepFolder
from tests.support import Jobs, finish, losses, wait_until

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(1200)]

# Two variants and one that no run can take, one seed; every step is logged.
SMALL = [
    "config=configs/ablation_debug.yaml",
    "steps=30",
    "sweep.budget=steps",
    "sweep.seeds=[0]",
    "data.seq_len=64",
    "data.batch_size=2",
    "model.dim=32",
    "model.n_layers=2",
    "optim.warmup=3",
    "checkpoint.dump.every=10",
    "checkpoint.eval.every=10",
    "eval.validation.max_docs=4",
    "logging.freq=1",
]
IMPOSSIBLE = "sweep.arms.odd={model.module_seq_len: 32, model.module_n_summary: 3}"
SEARCH = [
    "steps=20",
    "sweep.searcher=optuna",
    "sweep.num_samples=4",
    "sweep.params={optim.lr: {loguniform: [1.0e-4, 1.0e-1], when: {model.module_agg: [stack]}}}",
    "sweep.max_concurrent=2",
]
SEED = int(os.environ.get("CHAOS_SEED") or random.SystemRandom().randrange(10**6))


@pytest.fixture(scope="session")
def whole(ray_head: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> SweepFolder:
    """A sweep that nothing happens to, one of whose variants cannot be trained."""
    folder = SweepFolder(tmp_path_factory.mktemp("sweeps") / "whole")
    output = Jobs(ray_head).run(
        "ray_jobs.sweep", *SMALL, IMPOSSIBLE, f"dump_dir={folder.path}", code=1
    )
    assert "failed: odd__seed-0: model.module_n_summary=3" in output
    assert "started (2 at a time)" in output
    assert not any(line.startswith("Traceback") for line in output.splitlines())
    return folder


def standing(folder: SweepFolder) -> dict[str, str]:
    return {trial["name"]: trial["status"] for trial in folder.trials()}


def test_a_sweep_ends_reports_and_leaves_all_cpus(
    whole: SweepFolder, ray_session_joined: None
) -> None:
    import ray

    assert standing(whole) == {
        "dense__seed-0": "done",
        "drop__seed-0": "done",
        "stack__seed-0": "done",
        "odd__seed-0": "failed",
    }
    summary = json.loads(whole.report("json").read_text())
    assert [arm["done"] for arm in summary["arms"]] == [1, 1, 1, 0]
    (excluded,) = summary["excluded"]
    assert (excluded["trial"], excluded["status"]) == ("odd__seed-0", "failed")
    assert "module_n_summary=3" in whole.report("html").read_text()
    total = ray.cluster_resources()["CPU"]
    wait_until(lambda: ray.available_resources().get("CPU") == total, "all CPUs", 60)
    # From the trial's start: on a busy machine that takes longer than these few steps.
    trials = [
        [
            event["time"]
            for event in whole.run(name).events()
            if event["event"] in ("created", "end")
        ]
        for name in ("dense__seed-0", "drop__seed-0", "stack__seed-0")
    ]
    first, second = sorted(trials)[:2]
    assert second[0] < first[-1], "one after the other"


def test_trials_are_children_of_the_sweep_in_mlflow(whole: SweepFolder) -> None:
    client = MlflowClient(f"sqlite:///{whole.path.parent / 'mlflow.db'}")
    (experiment,) = [e for e in client.search_experiments() if e.name == "modular-lm"]
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    parent = runs.pop("ablation_debug")
    assert set(runs) == {"dense__seed-0", "drop__seed-0", "stack__seed-0"}
    for run in runs.values():
        assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert run.data.tags["sweep.seed"] == "0"
    assert runs["stack__seed-0"].data.tags["sweep.model.module_agg"] == "stack"
    assert (parent.info.status, parent.data.tags["trials.failed"]) == ("FAILED", "1")
    files = {file.path for file in client.list_artifacts(parent.info.run_id)}
    assert files >= {"report.html", "report.md", "report.json", "pictures"}


def test_run_again_repeats_nothing(whole: SweepFolder, jobs: Jobs) -> None:
    before = whole.run("dense__seed-0").events_file.read_bytes()
    jobs.run("ray_jobs.sweep", *SMALL, IMPOSSIBLE, f"dump_dir={whole.path}", code=1)
    assert whole.run("dense__seed-0").events_file.read_bytes() == before


@pytest.mark.parametrize(
    "number", [0, *(pytest.param(n, marks=pytest.mark.chaos) for n in range(1, 4))]
)
def test_a_killed_driver_the_same_command_finishes(
    whole: SweepFolder, jobs: Jobs, tmp_path: Path, number: int
) -> None:
    print(f"CHAOS_SEED={SEED} sweep {number}")
    moment = random.Random(f"{SEED if number else 0} sweep {number}")
    folder = SweepFolder(tmp_path / "killed")
    arguments = [*SMALL, "sweep.max_concurrent=2", f"dump_dir={folder.path}"]
    job = jobs.start("ray_jobs.sweep", *arguments)
    reach(folder, moment.randint(1, 75), job)
    done = [name for name, status in standing(folder).items() if status == "done"]
    ended = {name: folder.run(name).events_file.read_bytes() for name in done}
    job.send_signal(signal.SIGKILL)
    job.wait()
    jobs.run("ray_jobs.sweep", *arguments)
    assert set(standing(folder).values()) == {"done"}
    for name, events in ended.items():
        assert folder.run(name).events_file.read_bytes() == events
    assert_same_results(folder, whole)


@pytest.mark.chaos
def test_a_search_with_optuna_goes_on_from_a_kill_as_if_nothing_had_been(
    jobs: Jobs, tmp_path: Path
) -> None:
    print(f"CHAOS_SEED={SEED}")
    whole, killed = SweepFolder(tmp_path / "whole"), SweepFolder(tmp_path / "killed")
    jobs.run("ray_jobs.sweep", *SMALL, *SEARCH, f"dump_dir={whole.path}")
    assert len(whole.trials()) == 2 + 4  # the stack alone is searched
    arguments = [*SMALL, *SEARCH, f"dump_dir={killed.path}"]
    job = jobs.start("ray_jobs.sweep", *arguments)
    # The first round has four trials of 20 steps, the second two.
    reach(killed, random.Random(SEED).randint(50, 110), job)
    ended = {
        name: killed.run(name).events_file.read_bytes()
        for name, status in standing(killed).items()
        if status == "done"
    }
    assert job.poll() is None
    job.send_signal(signal.SIGKILL)
    job.wait()
    jobs.run("ray_jobs.sweep", *arguments)
    assert set(standing(killed).values()) == {"done"}
    for name, events in ended.items():
        assert killed.run(name).events_file.read_bytes() == events
    assert [t["suggestions"] for t in killed.trials()] == [t["suggestions"] for t in whole.trials()]
    assert_same_results(killed, whole)
    # Nothing is left to suggest.
    jobs.run("ray_jobs.sweep", *arguments)
    assert len(killed.trials()) == 6


def test_a_stop_saves_and_the_same_command_continues(
    whole: SweepFolder, jobs: Jobs, tmp_path: Path
) -> None:
    folder = SweepFolder(tmp_path / "stopped")
    arguments = [*SMALL, "sweep.max_concurrent=2", f"dump_dir={folder.path}"]
    job = jobs.start("ray_jobs.sweep", *arguments)
    reach(folder, 12, job)
    job.send_signal(signal.SIGTERM)
    assert "the same command continues" in finish(job, code=3)
    assert "running" not in standing(folder).values()
    assert "pending" in standing(folder).values()
    for trial in folder.trials():
        run = folder.run(trial["name"])
        if trial["attempts"] and trial["status"] == "pending" and (end := run.last_event("end")):
            assert end["status"] == "stopped"
            assert "interrupted (SIGTERM)" in trial["why"]
    jobs.run("ray_jobs.sweep", *arguments)
    assert_same_results(folder, whole)


def test_a_trial_whose_process_is_killed_is_tried_again(
    jobs: Jobs, tmp_path: Path, ray_session_joined: None
) -> None:
    import ray

    folder = SweepFolder(tmp_path / "robbed")
    only = "sweep.arms={dense: {model.module_seq_len: null}, drop: {optim.lr: 1.0e-3}}"
    job = jobs.start(
        "ray_jobs.sweep", *SMALL, "sweep.max_concurrent=1", only, f"dump_dir={folder.path}"
    )
    run = folder.run("dense__seed-0")
    wait_until(lambda: run.last_event("checkpoint") or job.poll() is not None, "a checkpoint")
    holder = (run.ray / "driver.lock").read_text()
    os.kill(int(holder.split()[1]), signal.SIGKILL)
    output = finish(job)
    assert "dense__seed-0: failed (its process ended: Worker unexpectedly exits" in output
    assert not any(line.startswith("Traceback") for line in output.splitlines())
    assert "Failed to fetch metrics" not in output
    assert set(standing(folder).values()) == {"done"}
    record = folder.read("dense__seed-0")
    assert record is not None
    assert (record["attempts"], record["failures"]) == (2, 1)
    ends = [event["outcome"] for event in run.events() if event["event"] == "attempt_end"]
    assert ends == ["lost", "done"]
    total = ray.cluster_resources()["CPU"]
    wait_until(lambda: ray.available_resources().get("CPU") == total, "all CPUs", 60)


@pytest.mark.chaos
def test_seconds_become_steps_by_pilots_also_after_a_stop(jobs: Jobs, tmp_path: Path) -> None:
    folder = SweepFolder(tmp_path / "seconds")
    bad = "sweep.arms.bad={distributed.attn_impl: xformers}"  # which a CPU cannot
    arms = "sweep.arms={dense: {}, drop: {model.module_seq_len: 32}, low: {optim.lr: 1.0e-4}}"
    wall = ["sweep.budget=wall", "sweep.amount=2", arms, "model.module_agg=drop", bad]
    arguments = [*SMALL, *wall, f"dump_dir={folder.path}"]
    job = jobs.start("ray_jobs.sweep", *arguments)
    second = folder.pilot("drop").metrics.path
    wait_until(lambda: second.exists() or job.poll() is not None, "the second pilot")
    job.send_signal(signal.SIGTERM)
    assert "the same command continues" in finish(job, code=3)
    first = folder.pilot("dense").metrics.path.read_bytes()
    assert set(standing(folder).values()) == {"pending"}
    output = jobs.run("ray_jobs.sweep", *arguments, code=1)
    assert "failed: bad__seed-0: its pilot: " in output
    assert not any(line.startswith("Traceback") for line in output.splitlines())
    assert folder.pilot("dense").metrics.path.read_bytes() == first
    trials = {trial["arm"]: trial for trial in folder.trials()}
    assert trials["dense"]["steps"] == trials["low"]["steps"]
    assert not folder.pilot("low").path.exists()
    for arm in ("dense", "drop", "low"):
        trial = trials[arm]
        assert trial["status"] == "done"
        assert trial["steps"] == max(1, round(2 / trial["seconds_per_step"]))
        assert [*folder.run(trial["name"]).metrics][-1]["global_step"] == trial["steps"]
    for arm in ("dense", "drop"):
        assert not (folder.pilot(arm).path / "checkpoints").exists()
        assert not list(folder.pilot(arm).eval_metrics)
    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    (experiment,) = [e for e in client.search_experiments() if e.name == "modular-lm"]
    assert len(client.search_runs([experiment.experiment_id])) == 1 + 3


def test_halving_stops_a_bad_trial_and_says_so(jobs: Jobs, tmp_path: Path) -> None:
    folder = SweepFolder(tmp_path / "halved")
    jobs.run(
        "ray_jobs.sweep", *SMALL, "steps=60", "sweep.scheduler=asha", "sweep.max_concurrent=1",
        "sweep.arms.stack={optim.lr: 1e-9}", f"dump_dir={folder.path}",
    )  # fmt: skip
    bad = folder.read("stack__seed-0")
    assert bad is not None
    assert bad["status"] == "stopped"
    assert bad["why"].startswith("sweep.scheduler=asha: loss ")
    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    (experiment,) = [e for e in client.search_experiments() if e.name == "modular-lm"]
    found = client.search_runs([experiment.experiment_id], "tags.`sweep.arm` = 'stack'")
    assert "sweep.scheduler=asha" in found[0].data.tags["end_reason"]


@pytest.mark.chaos
def test_the_median_stops_a_bad_trial_but_not_the_baseline(jobs: Jobs, tmp_path: Path) -> None:
    folder = SweepFolder(tmp_path / "median")
    # Two at a time: when those that do not learn begin, three others have ended, which is enough.
    good = "a: {}, b: {optim.lr: 2e-3}, c: {optim.lr: 4e-3}, d: {optim.lr: 5e-3}"
    arms = f"{{{good}, bad: {{optim.lr: 1e-9}}, base: {{optim.lr: 0}}}}"
    jobs.run(
        "ray_jobs.sweep", *SMALL, "steps=120", "sweep.scheduler=median", "sweep.max_concurrent=2",
        f"sweep.arms={arms}", "sweep.baseline=base", f"dump_dir={folder.path}",
    )  # fmt: skip
    assert standing(folder) == {
        **{f"{arm}__seed-0": "done" for arm in ("a", "b", "c", "d", "base")},
        "bad__seed-0": "stopped",
    }
    bad = folder.read("bad__seed-0")
    assert bad is not None
    assert bad["why"].startswith("sweep.scheduler=median: loss ")
    end = folder.run("bad__seed-0").last_event("end")
    assert end is not None
    # It has saved where it was, after the grace.
    assert (end["status"], end["reason"]) == ("stopped", bad["why"])
    assert 0.3 * 120 <= end["step"] < 120
    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    (experiment,) = [e for e in client.search_experiments() if e.name == "modular-lm"]
    reasons = {
        run.data.tags["sweep.arm"]: run.data.tags.get("end_reason")
        for run in client.search_runs([experiment.experiment_id])
        if "sweep.arm" in run.data.tags
    }
    assert reasons == {**dict.fromkeys(("a", "b", "c", "d", "base"), ""), "bad": bad["why"]}
    summary = json.loads(folder.report("json").read_text())
    assert [each["trial"] for each in summary["excluded"]] == ["bad__seed-0"]


def test_mistakes_exit_2_with_nothing_created(plain_jobs: Jobs, tmp_path: Path) -> None:
    where = f"dump_dir={tmp_path / 'sweep'}"
    for argument, named in {
        "sweep.baseline=dens": "did you mean dense?",
        "sweep.budget=token": "did you mean tokens?",
        "sweep.params={modle.dim: {grid: [1]}}": "modle",
        "data.sources={wiki: 1}": "data.root_dir",
    }.items():
        output = plain_jobs.run("ray_jobs.sweep", SMALL[0], where, argument, code=2)
        assert named in output
        assert output.count("\n") == 1
    assert not (tmp_path / "sweep").exists()


def reach(folder: SweepFolder, step: int, job: subprocess.Popen[str]) -> None:
    """Wait until all trials together have logged so many steps."""

    def there() -> bool:
        files = folder.path.glob("trials/*/metrics.jsonl")
        return job.poll() is not None or sum(f.read_bytes().count(b"\n") for f in files) >= step

    wait_until(there, f"{step} steps")


def assert_same_results(folder: SweepFolder, whole: SweepFolder) -> None:
    """That each trial has the losses of the uninterrupted sweep, in training and validation."""

    def validation(sweep: SweepFolder, name: str) -> list[Any]:
        lines = sweep.run(name).eval_metrics
        return [(line["global_step"], line["validation/builtin/nll"]) for line in lines]

    names = [name for name, status in standing(whole).items() if status == "done"]
    assert len(names) >= 3
    for name in names:
        assert losses(folder.run(name)) == losses(whole.run(name))
        assert validation(folder, name) == validation(whole, name)
