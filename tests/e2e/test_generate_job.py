"""`python -m ray_jobs.generate` on a trained run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from modular_lm.tracking.run_folder import RunFolder
from modular_lm.train.inventory import step_folder
from tests.support import Jobs

pytestmark = [pytest.mark.e2e, pytest.mark.slow]


def test_prints_and_writes_a_continuation(
    uninterrupted: RunFolder, plain_jobs: Jobs, tmp_path: Path
) -> None:
    out = tmp_path / "out.jsonl"
    arguments = (f"ckpt={uninterrupted.path}", "prompt=import: os", "max_tokens=40", f"out={out}")
    printed = plain_jobs.run("ray_jobs.generate", *arguments)
    line = json.loads(out.read_text())
    assert line["prompt"] == "import: os"
    assert 0 < len(line["tokens"]) <= 40
    assert f"import: os{line['text']}" in printed
    first = out.read_bytes()
    newest = step_folder(uninterrupted.checkpoints, 40)
    plain_jobs.run("ray_jobs.generate", f"ckpt={newest}", *arguments[1:])
    assert out.read_bytes() == first, "greedy, and a run stands for its latest checkpoint"


@pytest.mark.parametrize(
    ("argument", "named"),
    [
        ("ckpt=nowhere", "ckpt=nowhere: no such folder"),
        ("", "ckpt=: no such folder"),
        ("ckpt=configs", "ckpt=configs: holds no complete checkpoint"),
        ("ckpt=configs top_p=2", "top_p=2.0: expected a number > 0 and <= 1"),
    ],
)
def test_mistakes_are_one_line(plain_jobs: Jobs, argument: str, named: str) -> None:
    output = plain_jobs.run("ray_jobs.generate", *argument.split(), code=2)
    assert named in output
    assert output.count("\n") == 1


def test_out_into_a_missing_folder_is_refused_before_generating(
    uninterrupted: RunFolder, plain_jobs: Jobs
) -> None:
    output = plain_jobs.run(
        "ray_jobs.generate", f"ckpt={uninterrupted.path}", "out=nowhere/x.jsonl", code=2
    )
    assert "out=nowhere/x.jsonl: there is no folder" in output
