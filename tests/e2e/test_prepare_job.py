"""The prepare job as a user runs it: the same bytes on Ray as in one process; one-line errors."""

from __future__ import annotations

import gzip
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from modular_lm.config import PrepareConfig
from modular_lm.data.manifest import Manifest
from modular_lm.data.prepare import prepare_sources
from modular_lm.errors import DataError
from tests.support import Jobs, finish, wait_until

pytestmark = pytest.mark.e2e
TEXTS = [f"document {i} " + "na " * (i % 97) for i in range(900)]


def run(*args: str, cache: Path | None = None) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"MODULAR_LM_CACHE": str(cache or "/nonexistent/cache")}
    command = [sys.executable, "-m", "ray_jobs.prepare", *args]
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=180)


def lines_of(texts: list[str], key: str) -> bytes:
    return b"".join(json.dumps({key: t}).encode() + b"\n" for t in texts)


@pytest.fixture
def src(tmp_path: Path) -> Path:
    for name in ("mixed", "plain"):
        (tmp_path / "src" / name).mkdir(parents=True)
    mixed = tmp_path / "src" / "mixed"
    pq.write_table(pa.table({"text": TEXTS[:400]}), mixed / "a.parquet", row_group_size=100)
    (mixed / "b.jsonl.gz").write_bytes(gzip.compress(lines_of(TEXTS[400:600], "content")))
    (mixed / "c.jsonl.zst").write_bytes(zstandard.compress(lines_of(TEXTS[600:], "text")))
    (tmp_path / "src" / "plain" / "a.jsonl").write_bytes(lines_of([*TEXTS[:50], ""], "text"))
    return tmp_path / "src"


def test_on_ray_as_in_one_process(src: Path, tmp_path: Path) -> None:
    dst = tmp_path / "deep" / "dst"
    args = (f"src={src}", f"dst={dst}", "shards=3", "val_fraction=0.1")
    done = run(*args)
    assert done.returncode == 0, done.stderr
    serial = prepare_sources(
        PrepareConfig(src=str(src), dst=str(tmp_path / "serial"), shards=3, val_fraction=0.1)
    )
    for expected in serial:
        found = Manifest.load(dst / expected.source)
        assert (found.train, found.val) == (expected.train, expected.val)  # sha256 of every shard
        assert found.fingerprint == expected.fingerprint
    assert sorted(p.name for p in dst.iterdir()) == ["mixed", "plain"]
    assert {p.suffix for p in dst.rglob("*.*")} == {".json", ".parquet"}
    assert f"{serial[0].train.tokens:,}" in done.stdout
    assert "skipped, without text: plain: 1" in done.stdout
    assert "prepare mixed: tokenised part 1/1" in done.stderr

    start = time.monotonic()
    again = run(*args)
    assert (again.returncode, again.stdout) == (0, done.stdout)
    assert "prepare mixed: already prepared" in again.stderr
    assert time.monotonic() - start < 5

    refused = run(*args, "seed=1")
    assert_one_line(refused, "mixed is already prepared, and differently: seed: 42 -> 1;")


def test_broken_input_found_by_a_task(src: Path, tmp_path: Path) -> None:
    with (src / "mixed" / "d.jsonl").open("w") as stream:
        stream.write('{"text": "fine"}\n{"text": \n')
    failed = run(f"src={src}", f"dst={tmp_path / 'dst'}")
    assert_one_line(failed, "mixed/d.jsonl:2: not a line of JSON")
    assert not (tmp_path / "dst" / "mixed").exists()
    assert not list(tmp_path.rglob("manifest.json"))


def work_on_record(dst: Path, pattern: str) -> list[Path]:
    return list((dst / "many.partial" / "runs").glob(f"{pattern}.json"))


def test_killed_in_both_passes_it_goes_on(jobs: Jobs, tmp_path: Path) -> None:
    """kill -9 of the job, twice; what was on record is not made again, the result is the same."""
    src, dst = tmp_path / "many", tmp_path / "dst"
    src.mkdir()
    draw = random.Random(0)
    for i in range(10):  # poorly compressible, so that they make a slice each
        lines = lines_of([f"{i} {j} {draw.randbytes(5000).hex()}" for j in range(800)], "text")
        (src / f"{i}.jsonl.gz").write_bytes(gzip.compress(lines, 1))
    args = (f"src={src}", f"dst={dst}", "shards=30")
    made: dict[Path, int] = {}
    for pattern in ("[0-9a-f]" * 16, "train-*"):
        job = jobs.start("ray_jobs.prepare", *args)
        wait_until(lambda p=pattern: len(work_on_record(dst, p)) >= 2, "finished tasks", 120)
        job.kill()
        job.wait()
        with pytest.raises(DataError):
            Manifest.load(dst / "many.partial")
        assert not (dst / "many").exists()
        made |= {f: f.stat().st_mtime_ns for f in dst.rglob("*.run")}
    job = jobs.start("ray_jobs.prepare", *args)
    kept = wait_until(lambda: list(dst.rglob("*.run")), "runs")
    assert {f: f.stat().st_mtime_ns for f in kept}.items() <= made.items()
    output = finish(job)
    assert "prepare many: taking over 10 of 10 parts and" in output
    (expected,) = prepare_sources(
        PrepareConfig(src=str(src), dst=str(tmp_path / "serial"), shards=30)
    )
    found = Manifest.load(dst / "many")
    assert found.fingerprint == expected.fingerprint
    assert (found.train, found.val) == (expected.train, expected.val)
    assert [p.name for p in dst.iterdir()] == ["many"]


def assert_one_line(failed: subprocess.CompletedProcess[str], message: str) -> None:
    errors = [line for line in failed.stderr.splitlines() if line.startswith("error: ")]
    assert failed.returncode == 2, failed.stderr
    assert len(errors) == 1
    assert message in errors[0]
    assert "Traceback" not in failed.stderr


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["src=no/such"], "src="),
        (["tokenizer.name=sp"], "tokenizer.path=null: this kind of tokenizer needs"),
        (["tokenizer.name=sp", "tokenizer.path={src}/mixed/a.parquet"], "but a parquet file"),
        (["tokenizer.nmae=sp"], "unknown key tokenizer.nmae: did you mean tokenizer.name?"),
        (["src={src}/first"], "first/a.jsonl:1: not a line of JSON"),
        (["src=builtin", "seed=1", "dst=null"], "seed=1: without dst, the built-in corpus"),
    ],
)
def test_mistakes_are_answered_at_once(
    args: list[str], message: str, src: Path, tmp_path: Path
) -> None:
    (tmp_path / "src" / "first").mkdir()
    (tmp_path / "src" / "first" / "a.jsonl").write_text("hello\n")
    start = time.monotonic()
    failed = run(f"src={src}/mixed", f"dst={tmp_path}/dst", *[a.format(src=src) for a in args])
    assert time.monotonic() - start < 3
    assert failed.stderr.startswith("error: ")
    assert failed.stderr.count("\n") == 1
    assert_one_line(failed, message)
    assert not (tmp_path / "dst").exists()


def test_no_ray_is_imported_before_all_checks(src: Path, tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from modular_lm.config import PrepareConfig\n"
        "from ray_jobs.prepare import plan_sources\n"
        f"plan_sources(PrepareConfig(src={str(src)!r}, dst={str(tmp_path / 'dst')!r}))\n"
        "sys.exit('ray' in sys.modules or 'torch' in sys.modules)\n"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_the_builtin_corpus(tmp_path: Path) -> None:
    done = run("src=builtin", cache=tmp_path / "cache")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"sources in {tmp_path / 'cache'}/")
    assert len(list((tmp_path / "cache").rglob("manifest.json"))) == 1
