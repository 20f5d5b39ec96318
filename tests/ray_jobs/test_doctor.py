"""The doctor: what it finds, what it advises, and that it leaves everything as it was."""

from __future__ import annotations

import json
import logging
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import modular_lm
from modular_lm.config import TrainConfig, load_config
from modular_lm.config.schema import PrepareConfig
from modular_lm.data.prepare import prepare_sources
from modular_lm.train.inventory import COMPLETE, complete_steps, retain, step_folder
from ray_jobs import doctor
from ray_jobs._checks import checkpoints_at_once, disk_finding
from ray_jobs._site_checks import version_findings
from tests.slurm import Slurm
from tests.support import REPO, free_ports

DEBUG = f"config={REPO / 'configs' / 'debug.yaml'}"
Rows = dict[str, list[tuple[str, str]]]
Examine = Callable[..., tuple[int, Rows]]


@pytest.fixture
def examine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Examine:
    """Runs the doctor in an empty folder without a cluster: exit code and, by check, its rows."""
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setenv("MODULAR_LM_CACHE", str(tmp_path / "cache"))
    for name in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)

    def run(*args: str) -> tuple[int, Rows]:
        with pytest.raises(SystemExit) as caught:
            doctor.main(args)
        out, err = capsys.readouterr()
        assert (err == "") or caught.value.code == 2, err
        rows: Rows = {}
        for level, check, text in re.findall(r"^(ok|warning|error) +(\S+) +(.+)$", out, re.M):
            rows.setdefault(check, []).append((level, text))
        assert list(here.iterdir()) == [], "something was left behind"
        assert isinstance(caught.value.code, int)
        return caught.value.code, rows | {"": [("", err or out.splitlines()[-1])]}

    return run


def levels(rows: Rows, check: str) -> set[str]:
    return {level for level, _ in rows[check]}


def text_of(rows: Rows, check: str, level: str = "error") -> str:
    (text,) = [text for found, text in rows[check] if found == level]
    return text


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sources wiki (with a validation split) and notes (without)."""
    folder = tmp_path_factory.mktemp("shards")
    for source, share in (("wiki", 0.2), ("notes", 0.0)):
        text = folder / "text" / source
        text.mkdir(parents=True)
        lines = [json.dumps({"text": f"{source} {i}: {'some words ' * 100}"}) for i in range(50)]
        (text / "part.jsonl").write_text("\n".join(lines))
        dst = str(folder / "out")
        prepare_sources(PrepareConfig(src=str(text), dst=dst, val_fraction=share))
    return folder / "out"


def test_a_sound_job_on_this_machine(examine: Examine) -> None:
    level = logging.getLogger().level
    code, rows = examine(DEBUG)
    logging.getLogger("modular_lm").info("heard after the doctor as before")
    assert code == 0
    assert {level for found in rows.values() for level, _ in found} <= {"ok", "warning", ""}
    checks = "versions tokenizer config data dump_dir run disk memory gpu ray network mlflow"
    assert rows.keys() >= set(checks.split())
    assert "968,704 parameters, 200 steps" in text_of(rows, "config", "ok")
    assert "builtin: will be prepared" in text_of(rows, "data", "ok")
    assert logging.getLogger().level in (level, logging.INFO)
    assert not any(handler.filters for handler in logging.getLogger().handlers)


def test_a_sweep_is_planned_and_a_trial_of_its_baseline_looked_at(examine: Examine) -> None:
    config, script = f"config={REPO}/configs/ablation_debug.yaml", "script=ray_jobs.sweep"
    code, rows = examine(script, config, "sweep.arms.odd={model.n_heads: 3}")
    assert code == 0
    assert "4 variants x 2 seeds; below: a trial of dense" in text_of(rows, "sweep", "ok")
    assert "odd cannot be trained: model.dim=64" in text_of(rows, "sweep", "warning")
    assert "builtin: will be prepared" in text_of(rows, "data", "ok")
    code, rows = examine(script, config, "sweep.baseline=b")
    assert code == 2
    assert "sweep.baseline=b" in text_of(rows, "sweep")


def test_after_an_unknown_key_the_rest_is_still_looked_at(examine: Examine) -> None:
    code, rows = examine(DEBUG, "modle.dim=64")
    assert code == 2
    assert text_of(rows, "config") == "unknown key modle: did you mean model?"
    assert levels(rows, "versions") == {"ok"}
    assert "ok" in levels(rows, "ray")


def test_what_cannot_be_read_or_imported_is_a_row(
    examine: Examine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setitem(sys.modules, "psutil", None)
    (tmp_path / "wiki").mkdir()
    (tmp_path / "wiki" / "manifest.json").mkdir()  # stands for one that may not be read
    data = [f"data.root_dir={tmp_path}", "data.sources={wiki: 1}"]
    code, rows = examine(DEBUG, *data, "ray.num_workers=[2]")
    assert code == 2
    assert "expected a number, or [min,max]" in text_of(rows, "config")
    assert text_of(rows, "gpu").startswith("torch cannot be imported")
    assert levels(rows, "data") == {"error"}


def test_after_a_contradiction_data_and_folders_are_still_looked_at(
    examine: Examine, shards: Path
) -> None:
    data = [f"data.root_dir={shards}", "data.sources={wiki: 1}"]
    code, rows = examine(DEBUG, *data, "model.dim=130", "dump_dir=/proc/run")
    assert code == 2
    assert "must be divisible by model.n_heads" in text_of(rows, "config")
    assert "this tokenizer's" in text_of(rows, "data", "ok")
    assert text_of(rows, "dump_dir").startswith("/proc/run: cannot be made")


def test_sources_that_cannot_be_used_are_named(
    examine: Examine, shards: Path, shared_data: Path
) -> None:
    root = f"data.root_dir={shards}"
    _, rows = examine(DEBUG, root, "data.sources={wikki: 1}")
    assert "did you mean wiki?" in text_of(rows, "data")
    _, rows = examine(DEBUG, root, "data.sources={notes: 1}")
    assert text_of(rows, "data") == "notes: holds no validation documents"
    model = shared_data / "tokenizers" / "llama2" / "tokenizer.model"
    other = ["data.tokenizer.name=sp", f"data.tokenizer.path={model}"]
    code, rows = examine(DEBUG, root, "data.sources={wiki: 1}", *other)
    assert code == 2
    assert "prepared with another tokenizer (bytes" in text_of(rows, "data")
    _, rows = examine(DEBUG, root, "data.sources={wiki: 1}", "data.tokenizer.name=sp")
    assert "needs a sentencepiece model" in text_of(rows, "tokenizer")
    assert text_of(rows, "data", "warning").startswith("not checked")


def test_a_folder_that_cannot_be_made(examine: Examine, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file" / "run", tmp_path / ("x" * 300)):
        code, rows = examine(DEBUG, f"dump_dir={folder}")
        assert code == 2
        assert "cannot be made or written" in text_of(rows, "dump_dir")
        assert "ok" in levels(rows, "ray")
    assert {p.name for p in tmp_path.iterdir()} <= {"file", "here", "cache"}


def test_too_many_checkpoints_for_the_disk(examine: Examine, tmp_path: Path) -> None:
    huge = ["model.dim=65536", "model.n_layers=400", "model.n_heads=64", "checkpoint.dump.keep=-1"]
    code, rows = examine(DEBUG, *huge)
    assert code == 2
    assert re.match(r"4 checkpoints of [\d,.]+ GiB need", text_of(rows, "disk"))
    assert "per worker" in text_of(rows, "memory")
    _, rows = examine(DEBUG, *huge, f"checkpoint.path={tmp_path}/saved")
    assert f"more, {tmp_path} has" in text_of(rows, "disk")
    config, _ = load_config(TrainConfig, ["checkpoint.path=s3://bucket/x"])
    assert disk_finding(config, tmp_path).text == "checkpoint.path=s3://bucket/x: not checked"


@pytest.mark.parametrize(
    ("every", "keep", "eval_every", "eval_keep", "last"),
    [
        (10, 3, 0, 0, 40),
        (10, 0, 0, 0, 45),
        (10, 2, 20, 1, 100),
        (0, 3, 7, 0, 30),
        (10, 1, 15, 2, 61),
    ],
)
def test_the_checkpoints_that_lie_there_at_once_are_counted(
    tmp_path: Path, every: int, keep: int, eval_every: int, eval_keep: int, last: int
) -> None:
    """Against a run that saves and deletes as the trainer does."""
    keys = [f"steps={last}", f"checkpoint.dump.every={every}", f"checkpoint.dump.keep={keep}"]
    keys += [f"checkpoint.eval.every={eval_every}", f"checkpoint.eval.keep={eval_keep}"]
    config = load_config(TrainConfig, keys)[0]
    most = 0
    for step in range(1, last + 1):
        periods = (every, eval_every)
        if step == last or any(period and step % period == 0 for period in periods):
            step_folder(tmp_path, step).mkdir()
            (step_folder(tmp_path, step) / COMPLETE).touch()
            most = max(most, len(complete_steps(tmp_path)))
            retain(tmp_path, config.checkpoint)
    assert most == checkpoints_at_once(config)


def test_memory_is_compared_with_another_device(examine: Examine) -> None:
    code, rows = examine(DEBUG, "device_memory=0.1")
    assert code == 2
    assert "the device has 0.1 GiB" in text_of(rows, "memory")
    assert examine(DEBUG, "device_memory=80")[0] == 0


def test_gpus_that_are_asked_for_and_not_there(examine: Examine) -> None:
    import torch

    workers = torch.cuda.device_count() + 1
    code, rows = examine(DEBUG, "ray.use_gpu=true", f"ray.num_workers={workers}")
    assert code == 2
    assert text_of(rows, "gpu").startswith("ray.use_gpu=true: ")


def test_a_temporary_folder_too_long_for_sockets(
    examine: Examine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / ("d" * 60)
    folder.mkdir()
    monkeypatch.setenv("RAY_TMPDIR", str(folder))
    code, rows = examine(DEBUG)
    assert code == 2
    assert "too long for Ray's sockets" in text_of(rows, "ray")


def test_ray_that_does_not_answer_and_an_address_that_is_none(
    examine: Examine, monkeypatch: pytest.MonkeyPatch
) -> None:
    (port,) = free_ports(1)
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{port}")
    code, rows = examine(DEBUG)
    assert code == 2
    assert "Connection refused" in text_of(rows, "ray")
    monkeypatch.setenv("RAY_ADDRESS", f"http://127.0.0.1:{port}")
    _, rows = examine(DEBUG)
    assert "is where `ray job submit` hands jobs in" in text_of(rows, "ray")


@pytest.mark.e2e
def test_the_nodes_of_a_cluster_are_asked(
    examine: Examine, ray_head: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", ray_head["RAY_ADDRESS"])
    code, rows = examine(DEBUG, "ray.num_workers=7")
    assert code == 0, rows
    assert text_of(rows, "ray", "ok") == "1 nodes, 6 CPUs, 0 GPUs"
    assert "7 workers and their data need 8 CPUs" in text_of(rows, "ray", "warning")
    token = tmp_path / "token"
    token.write_text(Path(os.environ["RAY_AUTH_TOKEN_PATH"]).read_text())
    token.chmod(0o644)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
    _, rows = examine(DEBUG, "modle=1")
    assert "others may read it" in text_of(rows, "token", "warning")


def test_mlflow_that_is_away_unfit_or_unwanted(
    examine: Examine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (port,) = free_ports(1)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
    code, rows = examine(DEBUG)
    assert (code, levels(rows, "mlflow")) == (0, {"warning"})
    (tmp_path / "mlflow.db").write_bytes(b"no database" * 100)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    assert "not a database" in text_of(examine(DEBUG)[1], "mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", str(tmp_path / "mlruns"))
    assert "does not write plain folders" in text_of(examine(DEBUG)[1], "mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://[x")
    assert "Invalid IPv6 URL" in text_of(examine(DEBUG)[1], "mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:port")
    assert "no MLflow answers: nonnumeric port" in text_of(examine(DEBUG)[1], "mlflow", "warning")
    assert examine(DEBUG, "logging.mlflow.enabled=false")[0] == 0


def test_downloads_that_an_offline_node_cannot_make(
    examine: Examine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = ["script=ray_jobs.prepare", "dataset=fineweb_edu_10bt", f"dst={tmp_path / 'data'}"]
    code, rows = examine(*job, "tokenizer=llama3")
    assert (code, levels(rows, "network")) == (0, {"warning"})
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    code, rows = examine(*job, "tokenizer=llama3")
    assert code == 2
    assert "not on disk: tokenizer=llama3, dataset=fineweb_edu_10bt" in text_of(rows, "network")
    assert not (tmp_path / "data").exists()


def test_a_batch_script_without_slurm_and_a_script_that_is_no_job(
    examine: Examine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "submit.slurm"
    script.write_text("#!/bin/bash\n#SBATCH --nodes=2\n")
    monkeypatch.setenv("PATH", "/nowhere")
    code, rows = examine(DEBUG, f"script={script}")
    assert (code, levels(rows, "slurm")) == (0, {"warning"})
    code, rows = examine(DEBUG, "script=ray_jobs.trian")
    assert code == 2
    assert "did you mean ray_jobs.train?" in rows[""][0][1]


def test_a_batch_script_is_taken_for_its_own_job_and_not_for_sbatchs_variables(
    examine: Examine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script, plan = tmp_path / "submit.slurm", tmp_path / "ray" / "slurm" / "plan.json"
    script.write_text("#!/bin/bash\n#SBATCH --account=a\n#SBATCH --time=3\n")
    plan.parent.mkdir(parents=True)
    config = f"config={REPO}/configs/ablation_debug.yaml"
    plan.write_text(json.dumps({"script": "ray_jobs.sweep", "arguments": [config]}))
    sbatch = tmp_path / "sbatch"
    sbatch.write_text("#!/bin/sh\nenv | grep ^SBATCH_ >&2\n")
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    for name in ("ACCOUNT", "TIMELIMIT", "QOS"):
        monkeypatch.setenv(f"SBATCH_{name}", "theirs")
    _, rows = examine(f"script={script}")
    assert text_of(rows, "ray", "ok") == "the batch script starts one on the nodes of its job"
    assert "gpu" not in rows
    assert "3 variants" in text_of(rows, "sweep", "ok")
    assert text_of(rows, "slurm", "ok") == "SBATCH_QOS=theirs"


def test_packages_out_of_range_and_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pyproject.toml").write_text(
        "[project]\nrequires-python = '>=3.11'\n"
        "dependencies = ['numpy<1', 'pyyaml', 'no-such-package-of-ours>=3']\n"
    )
    (tmp_path / "modular_lm").mkdir()
    monkeypatch.setattr(modular_lm, "__file__", str(tmp_path / "modular_lm" / "__init__.py"))
    found = {row.level: row for row in version_findings()}
    assert found.keys() == {"warning", "error"}
    assert re.match(r"numpy \S+, tested with <1", found["warning"].text)
    assert found["error"].text == "no-such-package-of-ours is not installed, needs >=3"
    assert found["error"].advice == "pip install 'no-such-package-of-ours>=3'"


@pytest.mark.slurm
def test_slurms_own_opinion_of_a_batch_script(
    examine: Examine, slurm: Slurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_CONF", slurm.environment["SLURM_CONF"])
    script = tmp_path / "submit.slurm"
    script.write_text("#!/bin/bash\n#SBATCH --nodes=2 --partition=main\ntrue\n")
    code, rows = examine(DEBUG, f"script={script}")
    assert code == 0
    assert re.match(r"Job \d+ to start at .* on nodes n\[0-1\]", text_of(rows, "slurm", "ok"))
    script.write_text("#!/bin/bash\n#SBATCH --nodes=2 --partition=mian\ntrue\n")
    code, rows = examine(DEBUG, f"script={script}")
    assert code == 2
    assert "invalid partition specified: mian" in text_of(rows, "slurm")
    assert slurm.run("squeue", "--noheader").strip() == "", "nothing was submitted"
