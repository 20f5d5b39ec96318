"""What is checked of a job before it is submitted: as the job itself would."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from cluster.checks import Job, check_job, fewest_nodes, fit
from cluster.options import LaunchConfig
from modular_lm.config import SweepConfig, load_config
from modular_lm.errors import ConfigError, UserFacingError
from modular_lm.sweep.trials import plan_sweep
from modular_lm.tracking.run_folder import RunFolder
from tests.support import REPO

DEBUG = f"config={REPO}/configs/debug.yaml"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MODULAR_LM_CACHE", str(tmp_path / "cache"))


def check(*args: str, **options: object) -> Job:
    return check_job(LaunchConfig(**options), args)  # type: ignore[arg-type]


def test_a_good_config_is_checked_and_nothing_is_written(tmp_path: Path) -> None:
    job = check(DEBUG, "name=mine", "steps=7")
    assert job.dump_dir == tmp_path / "runs" / "mine"
    assert job.given["dump_dir"] == str(job.dump_dir)
    assert (job.given["steps"], job.workers, job.complete) == (7, (2, 2), False)
    assert list(tmp_path.iterdir()) == []


def test_paths_mean_the_same_where_the_job_runs(tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    args = ("src=text", "dst=shards", "tokenizer.name=tiktoken", "tokenizer.path=gpt2")
    job = check(*args, "dump_dir=here", script="ray_jobs.prepare")
    assert (job.given["src"], job.given["dst"]) == (f"{tmp_path}/text", f"{tmp_path}/shards")
    assert job.given["tokenizer"]["path"] == "gpt2"
    assert job.dump_dir == tmp_path / "here"
    builtin = check("src=builtin", "dump_dir=here", script="ray_jobs.prepare")
    assert builtin.given["src"] == "builtin"


def test_what_the_run_will_make_is_not_left_in_the_copy_of_the_code(tmp_path: Path) -> None:
    store = "logging.mlflow.tracking_uri=sqlite:///mlflow.db"
    job = check(DEBUG, "checkpoint.path=here/saved", store)
    assert job.given["checkpoint"]["path"] == f"{tmp_path}/here/saved"
    assert job.given["logging"]["mlflow"]["tracking_uri"] == f"sqlite:///{tmp_path}/mlflow.db"
    for given in ("sqlite:////s/m.db", "http://127.0.0.1:1", "databricks"):
        job = check(DEBUG, f"logging.mlflow.tracking_uri={given}")
        assert job.given["logging"]["mlflow"]["tracking_uri"] == given


def test_a_store_of_the_environment_must_be_absolute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///m.db")
    with pytest.raises(ConfigError, match=re.escape(f"e.g. sqlite:///{tmp_path}/m.db")):
        check(DEBUG)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:////s/m.db")
    check(DEBUG)


def test_a_begun_run_of_the_builtin_corpus_does_not_prepare_it_here(tmp_path: Path) -> None:
    RunFolder(tmp_path / "run").create()
    RunFolder(tmp_path / "run").append_event("created", uid="x")
    assert not check(DEBUG, "dump_dir=run").complete
    assert not (tmp_path / "cache").exists()


def test_one_worker_for_each_gpu_unless_it_is_given(tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    config.write_text(yaml.safe_dump({"data": {"batch_size": 1}}))
    assert check(f"config={config}", nodes=2, gpus_per_node=4).workers == (8, 8)
    given = check(f"config={config}", "ray.num_workers=6", nodes=2, gpus_per_node=4)
    assert given.workers == (6, 6)
    assert check(f"config={config}", nodes=2).workers == (1, 1)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["steps=x"], "steps='x': expected a whole number"),
        (["model.dmi=8"], "unknown key model.dmi: did you mean model.dim?"),
        (["node=2"], "unknown key node: did you mean nodes?"),
        (["partitoin=x"], "unknown key partitoin: did you mean partition?"),
        (["model.n_heads=3"], "model.dim=128: must be divisible"),
        (["data.sources={web: 1}", "data.root_dir=nowhere"], "nowhere"),
        (["data.tokenizer.name=sp"], "data.tokenizer.path"),
        (["checkpoint.init_ckpt_path=nowhere"], "checkpoint.init_ckpt_path="),
        (["dump_dir=s3://bucket/x"], "dump_dir=s3://bucket/x: must be a folder"),
    ],
)
def test_mistakes_are_found_before_submission(
    tmp_path: Path, args: list[str], message: str
) -> None:
    with pytest.raises(UserFacingError, match=re.escape(message)) as raised:
        check(DEBUG, *args)
    assert raised.value.exit_code == 2
    assert list(tmp_path.iterdir()) == []


def sweep_beside_its_base(folder: Path) -> str:
    """A sweep of runs/s whose base is a file beside it; as an argument."""
    base = yaml.safe_load((REPO / "configs" / "debug.yaml").read_text())
    (folder / "base.yaml").write_text(yaml.safe_dump(base))
    settings = {"base": "base.yaml", "seeds": [0], "arms": {"a": {"optim.lr": 0.1}}}
    (folder / "s.yaml").write_text(yaml.safe_dump({"name": "s", "steps": 3, "sweep": settings}))
    return "config=s.yaml"


def test_a_sweep_is_checked_as_far_as_its_baseline_and_needs_no_other_file(tmp_path: Path) -> None:
    config = sweep_beside_its_base(tmp_path)
    arm = "sweep.arms.b={data.root_dir: shards}"
    job = check(config, arm, "checkpoint.path=here", script="ray_jobs.sweep")
    assert (job.dump_dir, job.name, job.workers) == (tmp_path / "runs" / "s", "s", None)
    given = tmp_path / "given.yaml"
    given.write_text(yaml.safe_dump(job.given))
    for file in ("base.yaml", "s.yaml"):
        (tmp_path / file).unlink()
    config, values = load_config(SweepConfig, [f"config={given}"])
    assert job.given["checkpoint"]["path"] == f"{tmp_path}/here"
    assert job.given["sweep"]["arms"]["b"] == {"data.root_dir": f"{tmp_path}/shards"}
    plan = plan_sweep(config, values)
    assert plan.folder == job.dump_dir
    trial = plan.trials[0]
    assert trial.given["model"]["dim"] == 128
    assert trial.given["data"]["sources"] == {"builtin": 1.0}
    assert trial.given["steps"] == 3


def test_mistakes_of_a_sweep_are_found_before_submission(tmp_path: Path) -> None:
    config = sweep_beside_its_base(tmp_path)
    for args, message in (
        (["sweep.baseline=b"], "sweep.baseline=b: no variant has this name"),
        (["data.tokenizer.name=sp"], "data.tokenizer.path"),
        (["model.n_heads=3"], "sweep.baseline=a: cannot be trained: model.dim=128"),
    ):
        with pytest.raises(ConfigError, match=re.escape(message)):
            check(config, *args, script="ray_jobs.sweep")


def test_unknown_scripts_are_named() -> None:
    with pytest.raises(ConfigError, match=re.escape("did you mean ray_jobs.train?")):
        check(DEBUG, script="ray_jobs.trian")


def test_a_job_without_a_folder_needs_one() -> None:
    with pytest.raises(ConfigError, match=re.escape("dump_dir: ray_jobs.prepare has none")):
        check(script="ray_jobs.prepare")


def job(workers: tuple[int, int] | None, cpus: int = 1) -> Job:
    return Job("ray_jobs.train", {}, Path("/x"), "x", workers, cpus)


def test_cpus_are_those_of_the_workers_and_two_more() -> None:
    assert fit(LaunchConfig(nodes=2), job((4, 4), 3)).cpus_per_node == 2 * 3 + 2
    assert fit(LaunchConfig(nodes=2, cpus_per_node=9), job((4, 4), 3)).cpus_per_node == 9


@pytest.mark.parametrize(
    ("options", "workers", "message"),
    [
        ({"nodes": 2, "gpus_per_node": 2}, (5, 5), "ray.num_workers=5: nodes=2 with"),
        ({"nodes": 2, "cpus_per_node": 2}, (4, 4), "cpus_per_node=2: 4 workers of 1 CPUs"),
        ({"nodes": 2}, None, "cpus_per_node: say how many"),
    ],
)
def test_a_job_that_cannot_fit_is_refused(
    options: dict[str, int], workers: tuple[int, int] | None, message: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        fit(LaunchConfig(**options), job(workers))  # type: ignore[arg-type]


def test_a_job_goes_on_with_fewer_nodes_only_if_its_workers_may_be_fewer() -> None:
    assert fewest_nodes(LaunchConfig(nodes=4), job((8, 8))) == 4
    assert fewest_nodes(LaunchConfig(nodes=4), job((3, 8))) == 2
    assert fewest_nodes(LaunchConfig(nodes=4), job(None)) == 4


def test_nodes_that_would_train_nothing_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    fit(LaunchConfig(nodes=2), job((2, 2)))
    assert caplog.messages == []
    fit(LaunchConfig(nodes=3), job((1, 1)))
    assert caplog.messages == ["ray.num_workers=1: 2 of 3 nodes train nothing"]


def test_a_job_of_the_default_name_is_known_as_such(tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    config.write_text(yaml.safe_dump({"data": {"batch_size": 1}}))
    assert not check(f"config={config}").is_named
    assert check(f"config={config}", "name=x").is_named
    assert check(f"config={config}", "dump_dir=x").is_named
