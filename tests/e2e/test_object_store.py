"""Runs whose checkpoints lie in S3: a real server (moto's) on loopback, several processes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from modular_lm.storage import place
from modular_lm.tracking.run_folder import RunFolder
from modular_lm.train.checkpoint import load_for_inference
from modular_lm.train.inventory import complete_steps, step_folder, verify
from tests.support import TINY, Jobs, end, free_ports, listens, losses, wait_until

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(600)]
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
BUCKET = "checkpoints"


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """The address of an S3 server, with one bucket, that takes any credentials."""
    (port,) = free_ports(1)
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_until(lambda: listens(port), "the S3 server", 120)
        url = f"http://127.0.0.1:{port}"
        urllib.request.urlopen(urllib.request.Request(f"{url}/{BUCKET}", method="PUT"))
        yield url
    finally:
        end(process)


@pytest.fixture
def s3(server: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The environment for it, as S3's own tools read it; returns the bucket's URI."""
    import s3fs

    monkeypatch.setenv("AWS_ENDPOINT_URL", server)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "someone")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    s3fs.S3FileSystem.clear_instance_cache()
    return f"s3://{BUCKET}"


def with_s3(jobs: Jobs) -> Jobs:
    ours = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    return Jobs({**jobs.environment, **ours}, jobs.started)


def test_two_ranks_save_to_s3_and_go_on_from_there(
    s3: str, plain_jobs: Jobs, tmp_path: Path
) -> None:
    jobs, folder, where = with_s3(plain_jobs), RunFolder(tmp_path / "run"), f"{s3}/a/run"
    keys = (
        *("steps=12", "checkpoint.dump.every=4", f"checkpoint.path={where}"),
        f"dump_dir={folder.path}",
    )
    output = jobs.run("modular_lm.train", *TINY, *keys, launcher=TORCHRUN)
    assert f"checkpoint   {where}/0000000012" in output
    checkpoints = place(where)
    assert complete_steps(checkpoints) == [4, 8, 12]
    assert not (folder.path / "checkpoints").exists()
    events = [e for e in folder.events() if e["event"] == "checkpoint"]
    assert [e["path"] for e in events] == [f"{where}/{s:010d}" for s in (4, 8, 12)]
    whole, (trained, *_) = losses(folder), load_for_inference(str(folder.path))

    # As after a crash: the last is gone, debris of a save lies there.
    (step_folder(checkpoints, 12) / "COMPLETE").unlink()
    jobs.run("modular_lm.train", *TINY, *keys, launcher=TORCHRUN)
    assert [e["start_step"] for e in folder.events() if e["event"] == "attempt"] == [0, 8]
    assert losses(folder) == whole
    again, _, _, found = load_for_inference(where)
    assert str(found) == f"{where}/0000000012"
    verify(found)
    state = again.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in trained.state_dict().items())

    # Another run may not take the same place, but may start from there; so may other jobs.
    other = (*keys[:-1], f"dump_dir={tmp_path / 'other'}")
    refused = jobs.run("modular_lm.train", *TINY, *other, code=2)
    assert f"checkpoint.path={where}: is the place of another run's" in refused
    start = ("steps=1", f"checkpoint.init_ckpt_path={where}", f"dump_dir={tmp_path / 'third'}")
    jobs.run("modular_lm.train", *TINY, *start)
    text = jobs.run("ray_jobs.generate", f"ckpt={where}", "prompt=def", "max_tokens=4")
    assert "def" in text


@pytest.mark.parametrize(
    ("path", "changed", "code", "message"),
    [
        ("s3://nosuch/run", {}, 2, "s3://nosuch/run: there is no bucket nosuch; create it"),
        (
            "s3://checkpoints/run",
            {"AWS_ACCESS_KEY_ID": "", "AWS_EC2_METADATA_DISABLED": "true"},
            2,
            "s3://checkpoints/run: the store refuses access: .*credentials",
        ),
        (
            "s3://checkpoints/run",
            {"AWS_ENDPOINT_URL": "http://127.0.0.1:9"},
            1,
            "s3://checkpoints/run: the store cannot be reached or fails: Could not connect",
        ),
    ],
    ids=["bucket", "credentials", "server"],
)
def test_a_store_that_cannot_be_used_is_one_line_before_anything_is_written(
    s3: str,
    plain_jobs: Jobs,
    tmp_path: Path,
    path: str,
    changed: dict[str, str],
    code: int,
    message: str,
) -> None:
    jobs = with_s3(plain_jobs)
    jobs.environment.update(changed)
    keys = (f"checkpoint.path={path}", f"dump_dir={tmp_path / 'run'}")
    output = jobs.run("modular_lm.train", *TINY, *keys, code=code)
    assert re.search(f"^error: {message}", output, re.MULTILINE), output
    assert output.count("\n") == 1, output
    assert not (tmp_path / "run").exists()


def test_wrong_credentials_are_named(s3: str, server: str) -> None:
    from modular_lm.errors import ConfigError

    def allow(count: str) -> None:
        headers = {"Content-Type": "text/plain"}  # a form would be taken apart
        where = f"{server}/moto-api/reset-auth"
        request = urllib.request.Request(where, count.encode(), headers, method="POST")
        urllib.request.urlopen(request)

    allow("0")
    try:
        with pytest.raises(ConfigError, match=r"refuses access: .*credentials in the environment"):
            complete_steps(place(f"{s3}/run"))
    finally:
        allow("inf")
