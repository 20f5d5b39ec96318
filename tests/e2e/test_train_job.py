"""`python -m ray_jobs.train` on a real Ray: complete, interrupted, continued, refused."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import yaml

from modular_lm.config import TrainConfig
from modular_lm.config.load import from_dict
from modular_lm.data.dataset import Dataset
from modular_lm.data.fingerprint import digest
from modular_lm.tokenizer import build_tokenizer
from modular_lm.tracking.run_folder import RunFolder
from modular_lm.train.inventory import complete_steps, step_folder
from tests.support import (
    TINY,
    Jobs,
    assert_unharmed,
    digests,
    finish,
    losses,
    train_workers,
    wait_until,
)

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(900)]


def run_folder(path: Path) -> tuple[RunFolder, str]:
    return RunFolder(path), f"dump_dir={path}"


def test_a_run_leaves_what_the_design_promises(uninterrupted: RunFolder, jobs: Jobs) -> None:
    folder = uninterrupted
    curve = losses(folder)
    assert list(curve) == list(range(1, 41))
    assert curve[40] < 0.8 * curve[1]
    assert complete_steps(folder.checkpoints) == [10, 20, 30, 40]
    newest = {p.name for p in step_folder(folder.checkpoints, 40).iterdir()}
    assert newest >= {".metadata", "params.json", "train_state.json", "COMPLETE"}
    assert {"config.yaml", "base_config.yaml", "code"} <= {p.name for p in folder.path.iterdir()}
    assert {p.name for p in folder.logs.iterdir()} >= {folder.log_file(r).name for r in (0, 1)}
    (evaluation,) = list(folder.eval_metrics)
    assert evaluation["global_step"] == 40
    assert 0 < evaluation["validation/builtin/avg_seqlen"] <= 64
    (curves,) = json.loads(folder.curves_file(40).read_text())["sources"].values()
    start = curves["position_in_later_chunks"]["nll"][0]
    assert evaluation["validation/builtin/nll_chunk_start"] == start
    assert [len(curves[name]["nll"]) for name in ("position_in_chunk", "chunk_index")] == [16, 4]
    kinds = [event["event"] for event in folder.events()]
    assert kinds[:2] == ["created", "attempt"]
    assert kinds[-1] == "end"


def test_run_again_says_complete_and_where_in_seconds(uninterrupted: RunFolder, jobs: Jobs) -> None:
    began = time.monotonic()
    output = jobs.run("ray_jobs.train", *TINY, f"dump_dir={uninterrupted.path}")
    assert time.monotonic() - began < 10
    assert "is complete: step 40 of 40" in output
    assert str(uninterrupted.path) in output


def test_stopped_half_way_and_continued_by_another_number_of_workers(
    uninterrupted: RunFolder, jobs: Jobs, tmp_path: Path
) -> None:
    folder, where = run_folder(tmp_path / "staged")
    jobs.run("ray_jobs.train", *TINY, where, "stop_at=20")
    jobs.run("ray_jobs.train", *TINY, where, "ray.num_workers=3")
    whole, staged = losses(uninterrupted), losses(folder)
    assert whole.keys() == staged.keys()
    # The first half ran alike; the second sums in another order, so it differs by rounding.
    assert [staged[s] for s in range(1, 21)] == [whole[s] for s in range(1, 21)]
    assert max(abs(staged[s] - whole[s]) / whole[s] for s in whole) < 1e-4
    attempts = [e for e in folder.events() if e["event"] == "attempt"]
    assert [(a["start_step"], a["world_size"]) for a in attempts] == [(0, 2), (20, 3)]
    assert attempts[1]["config_changes"] == ["ray.num_workers: 2 -> 3"]
    assert digests(folder) == digests(uninterrupted)


def test_the_digest_of_the_data_can_be_computed_from_the_shards(uninterrupted: RunFolder) -> None:
    config = from_dict(TrainConfig, yaml.safe_load(uninterrupted.config.read_text()))
    data = Dataset(config.data, build_tokenizer(config.data.tokenizer), 8)
    for step, found in digests(uninterrupted).items():
        index = np.arange(8 * step)
        assert f"{digest(index, data.read(index)):016x}" == found


def test_data_that_changed_are_refused_then_allowed_and_recorded(
    uninterrupted: RunFolder, jobs: Jobs, tmp_path: Path
) -> None:
    """Workers that read for themselves, too: `data.loader=local` up to the change."""
    folder, where = run_folder(tmp_path / "changed")
    jobs.run("ray_jobs.train", *TINY, where, "stop_at=20", "data.loader=local")
    assert digests(folder) == {s: d for s, d in digests(uninterrupted).items() if s <= 20}
    refused = jobs.run("ray_jobs.train", *TINY, where, "data.seed=7", code=2)
    assert "data.seed: 42 -> 7" in refused
    assert "data.allow_change=true" in refused
    assert refused.count("\n") == 1
    jobs.run("ray_jobs.train", *TINY, where, "data.seed=7", "data.allow_change=true", "steps=30")
    first, second = [e for e in folder.events() if e["event"] == "attempt"]
    assert (first["data_changes"], second["data_changes"]) == ([], ["data.seed: 42 -> 7"])
    assert second["data"]["data.seed"] == "7"
    assert digests(folder)[20] == digests(uninterrupted)[20]
    assert digests(folder)[21] != digests(uninterrupted)[21]
    again = jobs.run("ray_jobs.train", *TINY, where, "steps=30", code=2)
    assert "data.seed: 7 -> 42" in again


def test_a_damaged_shard_is_named_without_a_traceback_or_a_second_try(
    uninterrupted: RunFolder, jobs: Jobs, cache: Path, tmp_path: Path
) -> None:
    folder, where = run_folder(tmp_path / "damaged")
    source = tmp_path / "data" / "lib"
    shutil.copytree(next(cache.glob("*/builtin")), source)
    with (source / "train-00000.parquet").open("r+b") as file:
        for at in range(0, 20 << 20, 4096):
            file.seek(at + 1000)
            file.write(b"\xff\xff")
    arguments = [f"data.root_dir={source.parent}", "data.sources={lib: 1}"]
    output = jobs.run("ray_jobs.train", *TINY, where, *arguments, code=2)
    assert re.search(r"error: .*data/lib/train-00000\.parquet: row \d+ differs", output)
    assert "DataError" not in output, "an exception that no rank expected"
    assert [event["event"] for event in folder.events()].count("attempt") == 1


def test_killed_worker_the_run_finishes_by_itself_with_the_same_loss(
    uninterrupted: RunFolder, jobs: Jobs, tmp_path: Path
) -> None:
    folder, where = run_folder(tmp_path / "killed")
    job = jobs.start("ray_jobs.train", *TINY, where)
    wait_until(lambda: 10 in complete_steps(folder.checkpoints), "a checkpoint")
    # While it runs, nobody else may train in this folder.
    second = jobs.run("ray_jobs.train", *TINY, where, code=2)
    assert "is being trained by" in second
    train_workers(jobs.environment)[-1].send_signal(signal.SIGKILL)
    finish(job)
    assert_unharmed(folder, uninterrupted)
    attempts = [e["start_step"] for e in folder.events() if e["event"] == "attempt"]
    ends = [e for e in folder.events() if e["event"] == "attempt_end"]
    assert len(attempts) == 2
    assert attempts[1] >= 10
    assert [e["outcome"] for e in ends] == ["failed", "done"]
    assert ends[1]["step"] == attempts[1] + ends[1]["steps"] == 40


def test_worker_killed_after_the_last_checkpoint_the_run_is_complete(
    uninterrupted: RunFolder, jobs: Jobs, tmp_path: Path
) -> None:
    folder, where = run_folder(tmp_path / "late")
    job = jobs.start("ray_jobs.train", *TINY, where)
    wait_until(lambda: 40 in complete_steps(folder.checkpoints), "the last checkpoint")
    for worker in train_workers(jobs.environment):
        worker.send_signal(signal.SIGKILL)
    finish(job)
    assert_unharmed(folder, uninterrupted)
    recorded = sorted(e["step"] for e in folder.events() if e["event"] == "checkpoint")
    assert recorded == [10, 20, 30, 40]


def test_sigterm_saves_exits_3_and_the_same_command_continues(
    uninterrupted: RunFolder, jobs: Jobs, plain_jobs: Jobs, tmp_path: Path
) -> None:
    """Of a job with a Ray of its own, sent to its whole process group, as `timeout` does."""
    folder, where = run_folder(tmp_path / "stopped")
    job = plain_jobs.start("ray_jobs.train", *TINY, where)
    wait_until(lambda: len(list(folder.metrics)) > 3, "some steps")
    os.killpg(job.pid, signal.SIGTERM)
    output = finish(job, code=3)
    (step,) = complete_steps(folder.checkpoints)[-1:]
    assert f"stopped at step {step} (SIGTERM)" in output
    end = folder.last_event("end")
    assert end is not None
    assert (end["status"], end["step"], end["exit_code"]) == ("stopped", step, 3)
    assert 3 < step < 40
    jobs.run("ray_jobs.train", *TINY, where)
    assert_unharmed(folder, uninterrupted)


def test_torchrun_trains_the_same_model(
    uninterrupted: RunFolder, plain_jobs: Jobs, tmp_path: Path
) -> None:
    folder, where = run_folder(tmp_path / "torchrun")
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    plain_jobs.run("modular_lm.train", *TINY, where, launcher=torchrun)
    assert_unharmed(folder, uninterrupted)


def test_one_plain_process_keeps_the_global_batch(
    uninterrupted: RunFolder, plain_jobs: Jobs, tmp_path: Path
) -> None:
    folder, where = run_folder(tmp_path / "plain")
    plain_jobs.run("modular_lm.train", *TINY, where, "grad_acc_steps=2")
    whole, plain = losses(uninterrupted), losses(folder)
    assert max(abs(plain[s] - whole[s]) / whole[s] for s in whole) < 1e-4


def test_what_a_run_may_not_change_is_refused(uninterrupted: RunFolder, jobs: Jobs) -> None:
    where = f"dump_dir={uninterrupted.path}"
    before = uninterrupted.config.read_text()
    for change, named in [
        ("model.dim=64", "model.dim: 32 -> 64"),
        ("data.seq_len=32", "data.seq_len: 64 -> 32"),
        ("seed=7", "seed: 42 -> 7"),
        ("data.batch_size=3", "data.batch_size: 4 -> 3"),
    ]:
        output = jobs.run("ray_jobs.train", *TINY, where, "steps=60", change, code=2)
        assert named in output
        assert "Traceback" not in output
    assert uninterrupted.config.read_text() == before


@pytest.mark.parametrize(
    ("argument", "named"),
    [
        ("modle.dim=64", "did you mean model?"),
        ("model.module_agg=averge", "did you mean avg?"),
        ("data.root_dir=nowhere data.sources={wiki: 1}", "nowhere: no such folder"),
        ("data.tokenizer.name=sp data.tokenizer.path=README.md", "data.tokenizer.path=README.md"),
        ("data.tokenizer.name=sp data.tokenizer.path=none.model", "none.model"),
    ],
)
def test_mistakes_exit_2_at_once_with_nothing_created(
    plain_jobs: Jobs, tmp_path: Path, argument: str, named: str
) -> None:
    dump_dir = tmp_path / "run"
    arguments = argument.split(" ", 1) if argument.startswith("data") else [argument]
    began = time.monotonic()
    output = plain_jobs.run(
        "ray_jobs.train", "config=configs/debug.yaml", f"dump_dir={dump_dir}", *arguments, code=2
    )
    assert time.monotonic() - began < 3
    assert named in output
    assert output.count("\n") == 1
    assert not dump_dir.exists()
