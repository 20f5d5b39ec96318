"""The MLflow page of a run, as a browser shows it: `mlflow server` and headless Chromium."""

from __future__ import annotations

import math
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
import yaml
from mlflow import MlflowClient
from mlflow.entities import Run

from modular_lm.config import TrainConfig
from modular_lm.eval.positions import LossSums, fold, write_curves
from modular_lm.files import write_text_atomic
from modular_lm.tracking import MlflowProjection, RunFolder, replay, snapshot_code
from ray_jobs._site_checks import mlflow_finding

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

RUN_NAME = "page_test_run"


@pytest.fixture(scope="module")
def chromium() -> str:
    """The browser's command; installed from Debian where it is missing and we may do so."""
    if (found := shutil.which("chromium")) is not None:
        return found
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        pytest.skip("needs chromium, which only root can install here (apt-get install chromium)")
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    for command in (
        ["apt-get", "update", "-qq"],
        ["apt-get", "install", "-y", "-qq", "--no-install-recommends", "chromium"],
    ):
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode != 0:
            pytest.skip(f"needs chromium; {' '.join(command)} failed: {done.stderr[-200:]}")
    found = shutil.which("chromium")
    assert found is not None
    return found


@pytest.fixture(scope="module")
def runs_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one synthetic run of two attempts, and its MLflow store."""
    runs = tmp_path_factory.mktemp("runs")
    folder = RunFolder(runs / RUN_NAME)
    folder.create()
    config = {"name": RUN_NAME, "steps": 300, "model": {"dim": 64, "module_agg": "avg"}}
    write_text_atomic(folder.config, yaml.safe_dump(config))
    write_text_atomic(folder.base_config, yaml.safe_dump({"name": RUN_NAME}))
    snapshot_code(folder.code)
    folder.append_event("created", uid="page-test", name=RUN_NAME)
    uri = f"sqlite:///{runs / 'mlflow.db'}"
    for attempt, first, last in ((1, 0, 150), (2, 100, 300)):
        folder.metrics.cut_after(first)
        folder.append_event(
            "attempt", attempt=attempt, start_step=first, world_size=2, hosts=["n0"]
        )
        for step in range(first + 10, last + 1, 10):
            folder.metrics.append(_training_line(step))
            if step % 100 == 0:
                _write_curves(folder, step)
                folder.eval_metrics.append(_validation_line(step))
                path = folder.checkpoints / f"{step:010d}"
                folder.append_event("checkpoint", step=step, path=str(path), bytes=1, seconds=0.1)
        if attempt == 2:
            folder.append_event("end", status="done", step=300, exit_code=0, reason=None)
        replay(folder, MlflowProjection(folder, uri, "modular-lm", RUN_NAME))
    return runs


def _training_line(step: int) -> dict[str, float]:
    loss = 1.5 + 4 * math.exp(-step / 80)
    return {
        "global_step": step,
        "loss/out": loss,
        "loss/bpb": loss / math.log(2),
        "optim/lr": 3e-4 * (1 - step / 400),
        "optim/grad_norm": 1 / (1 + step / 50),
        "optim/total_tokens": 4096 * step,
        "speed/wps": 12000 + 10 * (step % 70),
        "speed/data_wait": 0.01,
        "memory/rss": 900,
        "data/share/wiki": 0.4,
    }


def _write_curves(folder: RunFolder, step: int) -> None:
    sums, rows = LossSums.zeros(512), torch.arange(512) % 128
    losses = 1.6 + torch.exp(-rows / 2) + 4 * math.exp(-step / 80)
    sums.accumulate(losses[None], torch.ones(1, 512, dtype=torch.bool))
    write_curves(folder.curves_file(step), step, {"wiki": fold(sums, 128)})


def _validation_line(step: int) -> dict[str, float]:
    nll = 1.6 + 4 * math.exp(-step / 80)
    results = {"nll": nll, "bpb": nll / math.log(2), "ppl": math.exp(nll), "avg_seqlen": 200.5}
    return {
        "global_step": step,
        **{f"validation/{s}/{k}": v for s in ("wiki", "all") for k, v in results.items()},
    }


@pytest.fixture(scope="module")
def server(runs_dir: Path) -> Iterator[str]:
    """The address of an MLflow server on the store, which ends with the tests."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    store = ["--backend-store-uri", f"sqlite:///{runs_dir / 'mlflow.db'}"]
    place = ["--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    with open(runs_dir / "server.log", "wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "mlflow", "server", *store, *place],
            # Not the folder of the runs: what the page shows must not depend on it.
            cwd=runs_dir.parent,
            env=os.environ | {"MLFLOW_DISABLE_TELEMETRY": "true"},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    try:
        _wait_until_healthy(address, process)
        yield address
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_until_healthy(address: str, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        assert process.poll() is None, "the MLflow server ended by itself"
        try:
            with urllib.request.urlopen(f"{address}/health", timeout=5) as answer:
                if answer.status == 200:
                    return
        except OSError:
            time.sleep(0.5)
    pytest.fail("the MLflow server did not get healthy within 120 s")


def _open(
    chromium: str, url: str, screenshot: Path, missing: Callable[[str], Sequence[object]]
) -> None:
    """Open a page until nothing is `missing` from its HTML, and take a picture of it.

    Several times if need be: Chromium's virtual time may run ahead of a server under load.
    """
    command = [chromium, "--headless", "--no-sandbox", "--disable-gpu", "--window-size=1600,4000"]
    command += [f"--user-data-dir={screenshot}.profile", "--virtual-time-budget=25000"]
    for _ in range(5):
        dump = subprocess.run(
            [*command, "--dump-dom", url], capture_output=True, text=True, timeout=180, check=True
        )
        if not (lacks := missing(dump.stdout)):
            break
    subprocess.run(
        [*command, f"--screenshot={screenshot}", url], capture_output=True, timeout=180, check=True
    )
    assert not lacks, f"not on the page, see {screenshot}: {lacks}"
    assert screenshot.stat().st_size > 10_000


def _missing_text(*expected: str) -> Callable[[str], Sequence[str]]:
    def missing(html: str) -> Sequence[str]:
        text = re.sub(r"<[^>]*>", " ", html)
        return [word for word in expected if word not in text]

    return missing


@pytest.fixture(scope="module")
def run(server: str) -> Run:
    """The one run, as the server knows it."""
    client = MlflowClient(tracking_uri=server)
    experiment = client.get_experiment_by_name("modular-lm")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    return run


@pytest.fixture(scope="module")
def runs_page(server: str, run: Run) -> str:
    """The address of the list of runs; without `workflowType` MLflow shows its page on traces."""
    return f"{server}/#/experiments/{run.info.experiment_id}/runs?workflowType=machine_learning"


@pytest.fixture(scope="module")
def run_page(server: str, run: Run) -> str:
    """The address of the run's own page."""
    return f"{server}/#/experiments/{run.info.experiment_id}/runs/{run.info.run_id}"


def test_the_run_is_listed(chromium: str, runs_page: str, tmp_path: Path) -> None:
    _open(chromium, runs_page, tmp_path / "runs.png", _missing_text("Runs", RUN_NAME))


def test_overview_shows_the_run(chromium: str, run_page: str, tmp_path: Path) -> None:
    expected = (RUN_NAME, "Finished", "loss/out", "validation/all/bpb", "model.module_agg")
    _open(chromium, run_page, tmp_path / "overview.png", _missing_text(*expected))


def test_curves_are_drawn(chromium: str, run_page: str, tmp_path: Path) -> None:
    names = (RUN_NAME, "loss/out", "loss/bpb", "optim/lr", "validation/all/nll")

    def missing(html: str) -> list[object]:
        groups = re.findall(r'<g class="points">(.*?)</g>', html)
        drawn = {group.count("<path") for group in groups}
        # 300 steps with a line every 10, and validations at 100, 200, 300: the second attempt,
        # which went back from step 150 to 100, doubled nothing.
        return [*_missing_text(*names)(html), *({30, 3} ^ drawn - {0})]

    _open(chromium, f"{run_page}/model-metrics", tmp_path / "curves.png", missing)


def test_artifacts_are_listed(chromium: str, run_page: str, tmp_path: Path) -> None:
    configs = ("config.yaml", "base_config.yaml")
    expected = ("code", *configs, "checkpoints.json", "events.jsonl", "evals")
    _open(chromium, f"{run_page}/artifacts", tmp_path / "artifacts.png", _missing_text(*expected))


def test_the_doctor_reaches_the_server(server: str) -> None:
    config = TrainConfig()
    config.logging.mlflow.tracking_uri = server
    assert mlflow_finding(config, Path("runs")).level == "ok"
