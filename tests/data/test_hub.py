"""Downloads by name, from a Hub on loopback through the real client, with what goes wrong."""

from __future__ import annotations

import logging
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from email.utils import formatdate
from pathlib import Path
from typing import Any, get_args

import pytest

from modular_lm.config import PrepareConfig, TokenizerConfig, TrainConfig, load_config
from modular_lm.config.schema import DatasetName, TokenizerName
from modular_lm.data import hub, transfer
from modular_lm.data.hub import DATASETS, RECORD, TOKENIZERS, Record, Selection, download
from modular_lm.errors import ConfigError, DataError, RunFailedError
from modular_lm.tokenizer import KINDS, build_tokenizer
from tests.data.hub_server import (
    LISTING,
    TOKEN,
    Cut,
    Garbage,
    HubServer,
    Repo,
    Stall,
    Status,
    Whole,
)
from tests.support import REPO, wait_until

pytestmark = pytest.mark.timeout(60)
SELECTION = Selection("dataset", "org/texts", "data/*.jsonl")
OLD, NEW = "1" * 40, "2" * 40
BIG = "data/CC 1/big.jsonl"


def content(seed: int, size: int) -> bytes:
    return random.Random(seed).randbytes(size)


FILES = {
    BIG: content(0, 900_000),
    "data/CC 1/empty.jsonl": b"",
    "data/CC 2/small.jsonl": content(1, 70),
    "data/readme.md": b"not wanted",
    "sample/data/other.jsonl": b"not wanted",
}
WANTED = {path: text for path, text in FILES.items() if path.startswith("data/CC")}


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    texts = Repo("org/texts", "dataset", {OLD: {"data/old.jsonl": b"old"}, NEW: FILES})
    secret = Repo("org/secret", "model", {NEW: {"tokenizer.model": b"piece"}}, gated=True)
    monkeypatch.setattr(transfer, "_FIRST_WAIT", 0.01)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with HubServer(texts, secret, small=100) as started:
        monkeypatch.setenv("HF_ENDPOINT", started.url)
        yield started


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "dst" / "texts"


def get(folder: Path, revision: str | None = None) -> dict[str, bytes]:
    """Download, and read what the returned paths hold."""
    paths = download("dataset=texts", SELECTION, folder, revision)
    return {str(p.relative_to(folder)): p.read_bytes() for p in paths}


def names(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}


# ------------------------------------------------------------------ what works


def test_the_selected_files_and_a_record_of_them(
    server: HubServer, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert get(folder) == WANTED
    assert names(folder) == {*WANTED, RECORD}
    assert [p.name for p in folder.parent.iterdir()] == ["texts"]  # no locks left
    record = Record.load(folder)
    assert record is not None
    assert (record.commit, record.requested, record.complete) == (NEW, None, True)
    assert {f.path: f.size for f in record.files} == {p: len(t) for p, t in WANTED.items()}
    assert {f.path for f in record.files if f.sha256} == {BIG}  # the others by git's hash
    assert "download dataset=texts: 3/3 files, 0.9/0.9 MB" in caplog.text


def test_a_complete_download_is_used_without_a_network(server: HubServer, folder: Path) -> None:
    get(folder)
    asked = len(server.requests)
    assert get(folder) == WANTED
    assert get(folder, NEW) == WANTED
    assert len(server.requests) == asked


def test_a_file_that_is_lost_comes_from_the_recorded_commit(
    server: HubServer, folder: Path
) -> None:
    get(folder)
    server.repos[0].commits["3" * 40] = {BIG: b"newer"}
    (folder / BIG).unlink()
    assert get(folder) == WANTED
    assert server.ranges("data/CC 2/small.jsonl") == [None]  # the others stayed


def test_a_revision_is_pinned(server: HubServer, folder: Path) -> None:
    assert get(folder, OLD) == {"data/old.jsonl": b"old"}
    assert get(folder) == {"data/old.jsonl": b"old"}
    with pytest.raises(DataError, match=f"revision={NEW}: .* holds {OLD} of org/texts"):
        get(folder, NEW)


def test_the_token_goes_to_the_hub_alone(
    server: HubServer, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    get(folder)
    tokens = {r.path: r.token for r in server.requests}
    assert tokens[LISTING] == f"Bearer {TOKEN}"
    assert tokens[BIG] is None  # its content is at another origin


# ------------------------------------------------------------------ what goes wrong


@pytest.mark.parametrize("reset", [False, True])
def test_a_broken_transfer_goes_on_where_it_broke(
    reset: bool, server: HubServer, folder: Path
) -> None:
    server.faults[BIG] = [Cut(300_000, reset), Cut(500_000, reset)]
    assert get(folder) == WANTED
    first, second, third = server.ranges(BIG)
    assert first is None
    if reset:  # what was under way is lost
        assert second is None or second.startswith("bytes=")
    else:
        assert (second, third) == ("bytes=300000-", "bytes=500000-")
        assert server.sent(BIG) == len(FILES[BIG])


def test_a_server_that_ignores_ranges_does_not_spoil_the_file(
    server: HubServer, folder: Path
) -> None:
    server.faults[BIG] = [Cut(300_000), Whole()]
    assert get(folder) == WANTED


@pytest.mark.parametrize("path", [BIG, LISTING])
@pytest.mark.parametrize(
    "fault",
    [Status(429, {"Retry-After": "0"}), Status(503), Status(500, {"Retry-After": "0"})],
    ids=lambda f: str(f.code),
)
def test_a_busy_server_is_asked_again(
    fault: Status, path: str, server: HubServer, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server.faults[path] = [fault]
    assert get(folder) == WANTED
    assert f"{fault.code}" in caplog.text
    assert "trying again in 0 s" in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize(
    "headers", [{"Retry-After": "1"}, {"ratelimit": '"resolvers";r=0;t=1', "Retry-After": "9"}]
)
def test_the_server_says_how_long_to_wait(
    headers: dict[str, str], server: HubServer, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server.faults[BIG] = [Status(429, headers)]
    assert get(folder) == WANTED
    assert "trying again in 1 s" in caplog.text


@pytest.mark.slow
def test_the_server_says_until_when_to_wait(
    server: HubServer, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    date = formatdate(time.time() + 2, usegmt=True)  # of whole seconds
    server.faults[BIG] = [Status(503, {"Retry-After": date})]
    assert get(folder) == WANTED
    assert re.search("trying again in [12] s", caplog.text)


def test_a_server_that_stays_busy_ends_the_download_and_what_came_is_kept(
    server: HubServer, folder: Path
) -> None:
    server.faults[BIG] = [Cut(300_000), *[Status(503)] * 6]
    with pytest.raises(
        RunFailedError, match=r"dataset=texts: data/CC 1/big.jsonl: .*503"
    ) as failed:
        get(folder)
    assert "\n" not in str(failed.value)
    record = Record.load(folder)
    assert record is not None
    assert not record.complete
    assert get(folder) == WANTED
    assert server.sent(BIG) == len(FILES[BIG])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (content(7, 900_000), "sha256 [0-9a-f]{12} instead of"),
        (FILES[BIG][:-1], "899,999 bytes instead of 900,000"),
        (FILES[BIG] + b"x", "900,001 bytes instead of 900,000"),
    ],
    ids=["content", "short", "long"],
)
def test_a_file_of_other_content_is_not_taken(
    wrong: bytes, message: str, server: HubServer, folder: Path
) -> None:
    server.faults[BIG] = [Garbage(wrong)] * 2
    with pytest.raises(RunFailedError, match=message):
        get(folder)
    assert not (folder / BIG).exists()
    server.faults[BIG] = [Garbage(wrong)]  # once is a mishap
    assert get(folder) == WANTED


def test_a_small_file_of_other_content_is_not_taken(server: HubServer, folder: Path) -> None:
    server.faults["data/CC 2/small.jsonl"] = [Garbage(content(7, 70))] * 2
    with pytest.raises(RunFailedError, match=r"git hash [0-9a-f]{12} instead of"):
        get(folder)


def test_a_gated_repository(
    server: HubServer, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    selection = Selection("model", "org/secret", "tokenizer.model")
    with pytest.raises(DataError, match=r"tokenizer=t: .* \(401\): accept the licence") as refused:
        download("tokenizer=t", selection, folder, None)
    assert "set HF_TOKEN" in str(refused.value)
    assert not folder.parent.exists()
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    (file,) = download("tokenizer=t", selection, folder, None)
    assert file.read_bytes() == b"piece"


@pytest.mark.parametrize(
    ("selection", "revision", "message"),
    [
        (Selection("dataset", "org/nothing", "*"), None, "the Hub does not have it"),
        (SELECTION, "no-such-branch", "the Hub does not have it"),
        (Selection("dataset", "org/texts", "data/*.parquet"), None, "no files data/.*parquet"),
        (Selection("dataset", "org/texts", "missing/*"), None, "the Hub does not have it"),
    ],
)
def test_what_the_hub_does_not_have(
    selection: Selection, revision: str | None, message: str, server: HubServer, folder: Path
) -> None:
    with pytest.raises(DataError, match=message) as missing:
        download("dataset=texts", selection, folder, revision)
    assert "\n" not in str(missing.value)
    assert not folder.parent.exists()


def test_without_a_network(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with HubServer() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setattr(transfer, "_FIRST_WAIT", 0.01)
    with pytest.raises(RunFailedError, match=r"with internet .* download_only=true") as failed:
        get(folder)
    assert "\n" not in str(failed.value)
    assert not folder.parent.exists()


def test_a_listing_cannot_lead_out_of_its_folder(server: HubServer, folder: Path) -> None:
    server.repos[0].commits[NEW] = {"data/../../../evil.jsonl": b"x"}
    with pytest.raises(DataError, match="leads out of its folder"):
        get(folder)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"version": 1}', '{"version": 0}'])
def test_a_broken_record_is_named(text: str, folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / RECORD).write_text(text)
    with pytest.raises(DataError, match=f"{RECORD}: not the record of a download"):
        get(folder)


def test_other_files_are_left_alone(server: HubServer, folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / "mine.jsonl").write_text("x")
    with pytest.raises(DataError, match="holds something else than a download"):
        get(folder)
    other = folder.with_name("other")
    get(other)
    with pytest.raises(DataError, match=r"holds data/\*.jsonl of org/texts"):
        download("dataset=b", Selection("dataset", "org/texts", "sample/*"), other, None)


@pytest.mark.slow
def test_a_killed_download_goes_on_where_it_was(server: HubServer, tmp_path: Path) -> None:
    path = "sample/10BT/a.parquet"
    whole = content(3, 700_000)
    texts = Repo("HuggingFaceFW/fineweb-edu", "dataset", {NEW: {path: whole}})
    server.repos = (texts,)
    server.faults[path] = [Stall(400_000)]
    part = tmp_path / "dst" / "fineweb_edu_10bt" / (path + transfer.PART)
    command = [sys.executable, "-m", "ray_jobs.prepare", "dataset=fineweb_edu_10bt"]
    command += [f"dst={tmp_path / 'dst'}", "download_only=true"]
    with subprocess.Popen(command, cwd=REPO, env=dict(os.environ)) as job:
        try:
            wait_until(lambda: part.exists() and part.stat().st_size == 400_000, "a part", 30)
        finally:
            job.send_signal(signal.SIGKILL)
    server.repos[0].commits["3" * 40] = {path: b"newer"}
    assert subprocess.run(command, cwd=REPO, timeout=30).returncode == 0
    assert part.with_name("a.parquet").read_bytes() == whole
    assert server.ranges(path) == [None, "bytes=400000-"]
    assert server.sent(path) == len(whole)
    assert not part.exists()


# ------------------------------------------------------------------ the names


def test_every_name_has_an_entry() -> None:
    assert set(DATASETS) == set(get_args(DatasetName))
    assert set(KINDS) | set(TOKENIZERS) == set(get_args(TokenizerName))
    assert not set(KINDS) & set(TOKENIZERS)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"dataset": "fineweb"}, "dst=null: name the folder for dataset=fineweb"),
        ({"revision": "main"}, "revision=main: is of a dataset, and none is named"),
        ({"dataset": "fineweb", "dst": "d", "src": "."}, "does not hold dst=d"),
        ({"dataset": "fineweb", "dst": "d", "src": "d"}, "does not hold dst=d"),
        ({"dataset": "fineweb", "dst": "d", "src": "d/fineweb_shuffled/raw"}, "is not in fineweb"),
    ],
)
def test_datasets_that_cannot_be_placed(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        hub.fetch_dataset(PrepareConfig(**keys))


def test_a_tokenizer_may_be_given_by_its_name_alone(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("tokenizer: llama3\n")
    for args in (["tokenizer=llama3"], [f"config={file}"], ["tokenizer.name=llama3"]):
        assert load_config(PrepareConfig, args)[0].tokenizer == TokenizerConfig("llama3")
    with pytest.raises(ConfigError, match=r"tokenizer.name=lama3: .* did you mean llama3"):
        load_config(PrepareConfig, ["tokenizer=lama3"])


def test_training_says_how_to_get_a_named_tokenizer() -> None:
    config = load_config(TrainConfig, ["data.tokenizer=llama3"])[0]
    with pytest.raises(ConfigError, match=r"data.tokenizer.name=llama3: run .*prepare dst=DATA"):
        build_tokenizer(config.data.tokenizer)


def test_tokenizers_that_cannot_be_placed() -> None:
    with pytest.raises(ConfigError, match=r"dst=null: name the folder .* tokenizer llama3"):
        hub.fetch_tokenizer(PrepareConfig(tokenizer=TokenizerConfig("llama3")))
    with pytest.raises(ConfigError, match=r"tokenizer.path=x: llama3 is downloaded; .*tiktoken"):
        hub.fetch_tokenizer(PrepareConfig(dst="d", tokenizer=TokenizerConfig("llama3", "x")))


def test_the_library_log_stays_quiet(
    server: HubServer, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG, logger="modular_lm"):
        get(folder)
    assert {r.name.split(".")[0] for r in caplog.records} <= {"modular_lm"}
