"""Three ranks do what one process does: losses, validation, checkpoints, failures, stops.

All three-rank figures come from one launch of `ranks_worker`, the others from this process.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from modular_lm.model.init import init_weights
from modular_lm.model.lm import LanguageModel
from modular_lm.parallel import World, init_world
from modular_lm.tracking.run_folder import RunFolder
from tests.eval.held_out import random_documents, write_held_out
from tests.support import REPO, free_ports
from tests.train import ranks_worker as worker
from tests.train.ranks_worker import RESUMED_AT, RUNS, SIZE, STEPS, TOKENIZER

Results = dict[str, Any]
LIMIT = 300.0  # seconds; far more than it takes, also on a busy machine
pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    yield init_world(use_gpu=False)
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    documents = random_documents(worker.LENGTHS, 64)
    write_held_out(folder / "held_out", documents, TOKENIZER)
    return folder


@pytest.fixture(scope="module")
def one(world: World, folder: Path) -> dict[str, Results]:
    """What one process saw in each run."""
    return {name: worker.train(world, folder, name) for name in RUNS}


@pytest.fixture(scope="module")
def three(one: dict[str, Results], folder: Path) -> dict[str, list[Any]]:
    """What each of three ranks saw in each check; they resume a checkpoint of `one`."""
    (port,) = free_ports(1)
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(SIZE)}
    ranks = []
    for rank in range(SIZE):
        with open(folder / f"rank{rank}.log", "w") as log:
            command = [sys.executable, "-m", "tests.train.ranks_worker", str(folder)]
            environment = {**os.environ, **shared, "RANK": str(rank), "OMP_NUM_THREADS": "1"}
            ranks.append(
                subprocess.Popen(command, cwd=REPO, env=environment, stdout=log, stderr=log)
            )
    try:
        with contextlib.suppress(subprocess.TimeoutExpired):  # None below says which ranks hang
            for process in ranks:
                process.wait(timeout=LIMIT)
    finally:
        codes = [process.poll() for process in ranks]
        for process in ranks:
            process.kill()
            process.wait()
    logs = "\n".join((folder / f"rank{rank}.log").read_text()[-3000:] for rank in range(SIZE))
    assert codes == [0] * SIZE, logs
    return json.loads((folder / "results.json").read_text())


def column(lines: list[dict[str, float]], name: str) -> list[float]:
    return [line[name] for line in lines]


def test_sharded_weights_start_as_those_of_a_plain_model(three: dict[str, list[Any]]) -> None:
    config = worker.tiny()
    model = LanguageModel(config.model)
    init_weights(model, config.seed)
    plain = {name: worker.digest(p) for name, p in model.named_parameters()}
    assert three["initial"] == [plain] * SIZE


@pytest.mark.parametrize("run", RUNS)
def test_three_ranks_train_as_one_process(
    one: dict[str, Results], three: dict[str, list[Any]], run: str
) -> None:
    exact = 2e-2 if run == "bf16" else 1e-5
    alone = one[run]["metrics"]
    assert column(alone, "loss/out")[-1] < column(alone, "loss/out")[0]
    for rank in three[run]:
        lines = rank["metrics"]
        assert column(lines, "global_step") == [*range(1, STEPS + 1)]
        for name in ("loss/out", "loss/bpb"):
            assert column(lines, name) == pytest.approx(column(alone, name), rel=exact), name
        norms = column(lines, "optim/grad_norm"), column(alone, "optim/grad_norm")
        assert norms[0] == pytest.approx(norms[1], rel=max(exact, 1e-4))
        assert column(lines, "optim/total_tokens") == column(alone, "optim/total_tokens")


@pytest.mark.parametrize("run", RUNS)
def test_three_ranks_validate_as_one_process(
    one: dict[str, Results], three: dict[str, list[Any]], run: str
) -> None:
    exact = 2e-2 if run == "bf16" else 1e-5
    (alone,) = one[run]["evaluation"]
    scored = [min(n, worker.T + 1) - 1 for n in worker.LENGTHS]
    assert alone["validation/held_out/avg_seqlen"] == sum(scored) / len(scored)
    for rank in three[run]:
        (line,) = rank["evaluation"]
        assert line == pytest.approx(alone, rel=exact)
        assert line["validation/held_out/avg_seqlen"] == alone["validation/held_out/avg_seqlen"]


def test_three_ranks_leave_the_curves_of_one_process(
    folder: Path, one: dict[str, Results], three: dict[str, list[Any]]
) -> None:
    alone, together = (
        json.loads(RunFolder(folder / f"ragged_{size}").curves_file(STEPS).read_text())
        for size in (1, SIZE)
    )
    names = ("position_in_chunk", "position_in_later_chunks", "chunk_index")
    for name in names:
        found, expected = (r["sources"]["held_out"][name] for r in (together, alone))
        assert found["count"] == expected["count"]
        assert found["nll"] == pytest.approx(expected["nll"], rel=1e-5)
    # Of the documents of 32, 2, 6 and 5 targets in chunks of 8 only one goes beyond the first.
    assert alone["sources"]["held_out"]["chunk_index"]["count"] == [8 + 2 + 6 + 5, 8, 8, 8]
    nll = one["ragged"]["evaluation"][0]["validation/held_out/nll_chunk_start"]
    assert nll == alone["sources"]["held_out"]["position_in_later_chunks"]["nll"][0]


def test_three_ranks_leave_the_losses_of_documents_of_one_process(
    folder: Path, one: dict[str, Results], three: dict[str, list[Any]]
) -> None:
    alone, together = (
        json.loads(RunFolder(folder / f"ragged_{size}").documents_file(STEPS).read_text())
        for size in (1, SIZE)
    )
    expected, found = (report["sources"]["held_out"] for report in (alone, together))
    assert found["tokens"] == expected["tokens"]
    assert found["nll"] == pytest.approx(expected["nll"], rel=1e-5)


def test_the_layers_compute_in_the_type_asked_for_with_positions_in_fp32(
    three: dict[str, list[Any]],
) -> None:
    for run in RUNS:
        compute = "torch.bfloat16" if run == "bf16" else "torch.float32"
        assert [rank["types"] for rank in three[run]] == [[[compute, "torch.float32"]]] * SIZE, run


def test_one_process_resumes_what_three_ranks_saved(
    world: World, folder: Path, one: dict[str, Results], three: dict[str, list[Any]]
) -> None:
    lines = worker.Lines()
    trainer = worker.make_trainer(world, folder, "ragged", lines, into=f"ragged_{SIZE}")
    trainer.resume(STEPS)
    saved = three["ragged"][0]["state"]
    assert any("exp_avg_sq" in name for name in saved)
    assert worker.state_digests(trainer) == saved
    resumed = worker.resume(world, folder, saved_by=SIZE)
    straight = column(one["ragged"]["metrics"], "loss/out")
    assert column(resumed["metrics"], "loss/out") == pytest.approx(straight[RESUMED_AT:], rel=1e-5)


def test_three_ranks_resume_what_one_process_saved(
    world: World, folder: Path, one: dict[str, Results], three: dict[str, list[Any]]
) -> None:
    loaded = worker.resume(world, folder, saved_by=1)["loaded"]
    straight = column(one["ragged"]["metrics"], "loss/out")
    for rank in three["resumed"]:
        assert rank["loaded"] == loaded
        losses = column(rank["metrics"], "loss/out")
        assert losses == pytest.approx(straight[RESUMED_AT:], rel=1e-5)


def test_three_ranks_train_a_column_as_one_process(
    world: World, folder: Path, one: dict[str, Results], three: dict[str, list[Any]]
) -> None:
    alone = worker.column(world, folder)
    losses = column(alone["metrics"], "loss/out")
    base = {n: d for n, d in one["ragged"]["state"].items() if "/" not in n}
    for rank in three["column"]:
        assert column(rank["metrics"], "loss/out") == pytest.approx(losses, rel=1e-5)
        begun, trained = rank["begun"], rank["state"]
        assert begun == alone["begun"]
        for name, digest in base.items():
            assert (begun[name], trained[name]) == (digest, digest), name
            if name.startswith("layers."):
                assert begun[f"columns.code.{name}"] == digest
                assert trained[f"columns.code.{name}"] != digest
        assert {n.split("/")[0].split(".")[0] for n in trained if "/" in n} == {"columns"}
        assert rank["mixed"] == pytest.approx(alone["mixed"], rel=1e-4)


def test_what_fails_on_one_rank_fails_on_all_with_its_reason(three: dict[str, list[Any]]) -> None:
    expected = {
        "none": [0, 10, 20],
        "input": ["the act failed: rank 1: x.parquet: truncated", 2],
        "disk": ["the act failed: rank 2: shard: No space left on device", 1],
        "two": ["the act failed: rank 1: first of two", 1],
    }
    assert three["together"] == [expected] * SIZE


def test_a_rank_that_cannot_write_fails_the_save_on_all_and_leaves_no_checkpoint(
    three: dict[str, list[Any]],
) -> None:
    for rank in three["full_disk"]:
        start, end = "0000000002 could not be written: ", "__1_0.distcp: No space left on device"
        assert rank["message"].endswith(f"{start}rank 1: {end}")
        assert rank["exit_code"] == 1
        assert rank["complete"] == [1]
        # The next save works, and sweeps the debris of the one that failed.
        assert rank["complete_later"] == [1, 3]
        assert rank["folders"] == ["0000000001", "0000000003"]


def test_a_stop_asked_on_one_rank_stops_all_at_the_same_step(three: dict[str, list[Any]]) -> None:
    for rank in three["stop"]:
        assert (rank["status"], rank["step"]) == ("stopped", 2)
        assert [saved["step"] for saved in rank["saved"]] == [2]
