"""From a name to a source that training reads: download on one machine, prepare on another."""

from __future__ import annotations

import base64
import io
import shlex
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from modular_lm.config import TokenizerConfig
from modular_lm.data.reader import SourceReader
from modular_lm.tokenizer import build_tokenizer
from tests.data.hub_server import TOKEN, Cut, HubServer, Repo, Status
from tests.support import Jobs

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]
COMMIT = "c" * 40
RANKS = b"".join(base64.b64encode(bytes([b])) + b" %d\n" % b for b in range(256))
TEXTS = [f"document {i}: " + "à la carte " * (i % 37) for i in range(600)]


def parquet(texts: list[str]) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.table({"text": texts, "url": texts}), file, row_group_size=50)
    return file.getvalue()


def lines(texts: list[str]) -> bytes:
    return zstandard.compress("".join(f'{{"text": "{t}"}}\n' for t in texts).encode())


@pytest.fixture
def server() -> HubServer:
    edu = {
        "README.md": b"x" * 1000,
        "sample/10BT/000_00000.parquet": parquet(TEXTS[:400]),
        "sample/10BT/001_00000.parquet": parquet(TEXTS[400:]),
        "data/CC-MAIN-2013-20/train-00000-of-00001.parquet": parquet(["not in the sample"]),
    }
    dclm = {
        f"global-shard_0{i}_of_10/local-shard_0_of_10/shard_00000000_processed.jsonl.zst": lines(
            TEXTS[300 * (i - 1) : 300 * i]
        )
        for i in (1, 2)
    }
    llama3 = {"original/tokenizer.model": RANKS, "config.json": b"{}"}
    return HubServer(
        Repo("HuggingFaceFW/fineweb-edu", "dataset", {COMMIT: edu}),
        Repo("mlfoundations/dclm-baseline-1.0", "dataset", {COMMIT: dclm}),
        Repo("meta-llama/Meta-Llama-3-8B", "model", {COMMIT: llama3}, gated=True),
        small=2000,
    )


def texts_of(folder: Path, tokenizer: TokenizerConfig) -> dict[str, list[str]]:
    decode = build_tokenizer(tokenizer).decode
    return {
        split: [decode(d.tolist()) for d in SourceReader(folder, split).documents()]
        for split in ("train", "val")
    }


def online(jobs: Jobs, server: HubServer, **more: str) -> None:
    hub = {"HF_ENDPOINT": server.url, "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
    jobs.environment = {**jobs.environment, **hub, **more}


def test_download_here_and_prepare_there(
    server: HubServer, plain_jobs: Jobs, jobs: Jobs, tmp_path: Path
) -> None:
    dst = tmp_path / "data"
    args = ["dataset=fineweb_edu_10bt", f"dst={dst}", "tokenizer=llama3"]
    args += ["shards=2", "val_fraction=0.1"]
    with server:
        online(plain_jobs, server)
        refused = plain_jobs.run("ray_jobs.prepare", *args, "download_only=true", code=2)
        assert "error: tokenizer=llama3: " in refused
        assert "accept the licence" in refused
        assert not dst.exists()

        online(plain_jobs, server, HF_TOKEN=TOKEN)
        sample = "sample/10BT/000_00000.parquet"
        server.faults[sample] = [Cut(2000), Status(429, {"Retry-After": "0"})]
        said = plain_jobs.run("ray_jobs.prepare", *args, "download_only=true")
        assert server.ranges(sample) == [None, "bytes=2000-", "bytes=2000-"]
        assert not server.ranges("data/CC-MAIN-2013-20/train-00000-of-00001.parquet")
    assert f"run: python -m ray_jobs.prepare {shlex.join(args)}\n" in said
    assert sorted(p.name for p in dst.iterdir()) == ["fineweb_edu_10bt", "tokenizers"]

    jobs.environment = {**jobs.environment, "HF_ENDPOINT": server.url}  # where nobody listens now
    said = jobs.run("ray_jobs.prepare", *args)
    model = TokenizerConfig("tiktoken", str(dst / "tokenizers/llama3/original/tokenizer.model"))
    found = texts_of(dst / "fineweb_edu_10bt_shuffled", model)
    assert sorted(found["train"] + found["val"]) == sorted(TEXTS)
    assert found["val"]
    (hint,) = (line for line in said.splitlines() if line.startswith("to train on them: "))
    keys = shlex.split(hint.removeprefix("to train on them: "))
    shown = plain_jobs.run("ray_jobs.train", "config=configs/debug.yaml", *keys, "dry_run=true")
    assert f"path: {model.path}" in shown

    again = jobs.run("ray_jobs.prepare", *args)
    assert "already prepared" in again


def test_all_files_of_a_dataset_are_one_source(
    server: HubServer, jobs: Jobs, tmp_path: Path
) -> None:
    args = ["dataset=dclm_baseline_1.0", f"dst={tmp_path / 'data'}", f"src={tmp_path / 'raw'}"]
    with server:
        online(jobs, server)
        said = jobs.run("ray_jobs.prepare", *args, f"revision={COMMIT}", "tokenizer=bytes")
    assert [p.name for p in (tmp_path / "data").iterdir()] == ["dclm_baseline_1.0_shuffled"]
    found = texts_of(tmp_path / "data" / "dclm_baseline_1.0_shuffled", TokenizerConfig())
    assert sorted(found["train"] + found["val"]) == sorted(TEXTS)
    assert "'data.sources={dclm_baseline_1.0_shuffled: 1.0}'" in said
