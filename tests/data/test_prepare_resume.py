"""An interrupted prepare keeps what it finished, and the same call goes on from there."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from modular_lm.config import PrepareConfig, TokenizerConfig
from modular_lm.data import prepare, runs, shuffle
from modular_lm.data.finished import record, recorded, sweep, task_hash
from modular_lm.data.manifest import Manifest
from modular_lm.data.prepare import prepare_sources
from modular_lm.data.reader import SourceReader
from modular_lm.data.shuffle import ShardTask, SliceTask
from modular_lm.errors import DataError, RunFailedError

FILES, SHARDS = 6, 3


def write(file: Path, texts: list[str]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PrepareConfig:
    """Six slices, of one run each and more, and three shards per split."""
    monkeypatch.setattr(prepare, "SMALLEST_SLICE", 1)
    monkeypatch.setattr(shuffle, "RUN_BYTES", 20_000)
    for i in range(FILES):
        write(
            tmp_path / "src" / "wiki" / f"{i}.jsonl", [f"{i} {j} " + "la " * j for j in range(60)]
        )
    src, dst = str(tmp_path / "src"), str(tmp_path / "dst")
    return PrepareConfig(src, dst, val_fraction=0.2, shards=SHARDS)


class Counted:
    """Runs tasks in this process and counts them; after `fail_after` of them, raises `error`."""

    def __init__(self, fail_after: int | None = None, error: BaseException | None = None) -> None:
        self.slices, self.shards = 0, 0
        self._left, self._error = fail_after, error or KeyboardInterrupt()

    def __call__(self, function: Callable[[Any], Any], tasks: Any) -> Iterator[Any]:
        for task in tasks:
            if self._left is not None:
                if self._left == 0:
                    raise self._error
                self._left -= 1
            self.slices += isinstance(task, SliceTask)
            self.shards += isinstance(task, ShardTask)
            yield function(task)


def interrupted(config: PrepareConfig, after: int) -> None:
    with pytest.raises(KeyboardInterrupt):
        prepare_sources(config, map_tasks=Counted(after))


def whole(config: PrepareConfig, tmp_path: Path) -> Manifest:
    """The source as an uninterrupted prepare makes it, elsewhere."""
    (manifest,) = prepare_sources(replace(config, dst=str(tmp_path / "whole")))
    return manifest


def assert_same(config: PrepareConfig, found: list[Manifest], tmp_path: Path) -> None:
    expected = whole(config, tmp_path)
    assert (found[0].train, found[0].val) == (expected.train, expected.val)  # every sha256
    assert found[0].problems == expected.problems
    assert found[0].duplicates == expected.duplicates
    assert [p.name for p in (tmp_path / "dst").iterdir()] == ["wiki"]
    for split in ("train", "val"):
        assert SourceReader(tmp_path / "dst" / "wiki", split).verify() is None


@pytest.mark.parametrize(("done_slices", "done_shards"), [(1, 0), (5, 0), (6, 0), (6, 1), (6, 5)])
def test_finished_tasks_are_not_done_again(
    done_slices: int, done_shards: int, config: PrepareConfig, tmp_path: Path, caplog
) -> None:
    interrupted(config, done_slices + done_shards)
    for folder in (tmp_path / "dst").rglob("*"):
        if folder.is_dir():
            with pytest.raises(DataError):
                Manifest.load(folder)
    caplog.set_level("INFO")
    again = Counted()
    found = prepare_sources(config, map_tasks=again)
    assert (again.slices, again.shards) == (FILES - done_slices, 2 * SHARDS - done_shards)
    shards = f"{done_shards} of 6" if done_slices == FILES else "no"
    assert f"taking over {done_slices} of 6 parts and {shards} shards of an inter" in caplog.text
    assert_same(config, found, tmp_path)


def test_interrupted_again_and_again(config: PrepareConfig, tmp_path: Path) -> None:
    for _ in range(FILES + 2 * SHARDS - 1):
        interrupted(config, 1)
    last = Counted(1)
    assert_same(config, prepare_sources(config, map_tasks=last), tmp_path)


def test_nothing_finished_leaves_nothing(config: PrepareConfig, tmp_path: Path) -> None:
    interrupted(config, 0)
    assert not (tmp_path / "dst").exists()


def test_a_broken_file_can_be_mended(config: PrepareConfig, tmp_path: Path) -> None:
    good = (tmp_path / "src/wiki/3.jsonl").read_text()
    (tmp_path / "src/wiki/3.jsonl").write_text(good + "{broken")
    with pytest.raises(DataError, match=r"3\.jsonl:61: not a line of JSON"):
        prepare_sources(config, map_tasks=Counted())
    (tmp_path / "src/wiki/3.jsonl").write_text(good)
    again = Counted()
    found = prepare_sources(config, map_tasks=again)
    assert again.slices == 3  # the broken one, and those behind it
    assert_same(config, found, tmp_path)


@pytest.mark.parametrize("what", ["run", "shard"])
def test_a_full_disk(what: str, config: PrepareConfig, tmp_path: Path, monkeypatch) -> None:
    with monkeypatch.context() as patch:
        calls = iter(range(1000))

        def full(*args: Any) -> Any:
            if next(calls) == 4:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return real(*args)

        name = "write_run" if what == "run" else "ShardWriter"
        real = getattr(shuffle, name)
        patch.setattr(shuffle, name, full)
        with pytest.raises(RunFailedError, match="No space left on device; free some space"):
            prepare_sources(config, map_tasks=Counted())
    again = Counted()
    found = prepare_sources(config, map_tasks=again)
    assert 0 < again.slices + again.shards < FILES + 2 * SHARDS
    assert_same(config, found, tmp_path)


# ------------------------------------------------------------------ what may not be taken over


def touched(tmp_path: Path) -> None:
    file = tmp_path / "src/wiki/2.jsonl"
    os.utime(file, ns=(1, 1))


def lengthened(tmp_path: Path) -> None:
    write(tmp_path / "src/wiki/2.jsonl", [f"other {j}" for j in range(70)])


@pytest.mark.parametrize("change", [touched, lengthened])
def test_a_changed_file_is_done_again(change, config: PrepareConfig, tmp_path: Path) -> None:
    interrupted(config, FILES + 2)
    change(tmp_path)
    again = Counted()
    found = prepare_sources(config, map_tasks=again)
    assert again.slices == 1
    # Shards are made of all files.
    assert again.shards == 2 * SHARDS
    assert_same(config, found, tmp_path)


@pytest.mark.parametrize(
    ("changes", "slices"),
    [
        ({"seed": 1}, FILES),
        ({"add_bos": False}, FILES),
        ({"val_fraction": 0.5}, FILES),
        pytest.param({"tokenizer": None}, FILES, marks=pytest.mark.slow),
        ({"dedup": True}, 0),  # of no concern to pass 1
        ({"shards": 2}, 0),
    ],
)
def test_other_settings(
    changes: dict, slices: int, config: PrepareConfig, tmp_path: Path, request
) -> None:
    if "tokenizer" in changes:
        data = request.getfixturevalue("shared_data")
        model = str(data / "tokenizers/llama3/tokenizer.model")
        changes = {"tokenizer": TokenizerConfig("tiktoken", model)}
    interrupted(config, FILES + 2)
    again = Counted()
    other = replace(config, **changes)
    found = prepare_sources(other, map_tasks=again)
    assert (again.slices, again.shards) == (slices, 2 * (other.shards or 0))
    assert_same(other, found, tmp_path)


def test_damaged_work_is_done_again(config: PrepareConfig, tmp_path: Path) -> None:
    interrupted(config, FILES + 2)
    work = tmp_path / "dst" / "wiki.partial"
    run = min((work / "runs").glob("*.run"))
    run.write_bytes(run.read_bytes()[:-2])
    broken = next(p for p in (work / "runs").glob("*.json") if run.name[:16] not in p.name)
    broken.write_text(broken.read_text()[:20])
    again = Counted()
    found = prepare_sources(config, map_tasks=again)
    assert again.slices + again.shards > 2 * SHARDS - 2
    assert_same(config, found, tmp_path)


def test_a_missing_shard_is_done_again(config: PrepareConfig, tmp_path: Path) -> None:
    interrupted(config, FILES + 2)
    min((tmp_path / "dst/wiki.partial/shards").glob("*.parquet")).unlink()
    again = Counted()
    found = prepare_sources(config, map_tasks=again)
    assert (again.slices, again.shards) == (0, 2 * SHARDS - 1)
    assert_same(config, found, tmp_path)


def test_debris_is_swept(config: PrepareConfig, tmp_path: Path, caplog) -> None:
    interrupted(config, 3)
    work = tmp_path / "dst" / "wiki.partial"
    (work / "runs" / "0123.tmp").write_bytes(b"junk")
    (work / "runs" / "tmpabc").mkdir()
    (work / "runs" / "tmpabc" / "train-00000.parquet.tmp").write_bytes(b"junk")
    (work / "shards" / "train-00007.parquet").write_bytes(b"junk")
    caplog.set_level("INFO")
    assert_same(config, prepare_sources(config), tmp_path)
    assert "3 unfinished or other files removed" in caplog.text


def test_a_run_that_died_after_publishing_gives_its_disk_back(
    config: PrepareConfig, tmp_path: Path
) -> None:
    interrupted(config, FILES)
    (tmp_path / "dst/wiki.partial").rename(tmp_path / "kept")
    made = prepare_sources(config)
    (tmp_path / "kept").rename(tmp_path / "dst/wiki.partial")
    assert prepare_sources(config, map_tasks=Counted(0)) == made
    assert [p.name for p in (tmp_path / "dst").iterdir()] == ["wiki"]


# ------------------------------------------------------------------ records


def test_records(tmp_path: Path) -> None:
    assert recorded(tmp_path, "a") is None
    record(tmp_path, "a", {"n": 1})
    assert recorded(tmp_path, "a") == {"n": 1}
    (tmp_path / "b.json").write_text("{")
    assert recorded(tmp_path, "b") is None
    (tmp_path / "a.run").touch()
    assert sweep(tmp_path, ["a"], ["a.run"]) == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.json", "a.run"]


def test_names_of_tasks_are_the_same_everywhere() -> None:
    assert task_hash("a", [1, None]) == task_hash("a", (1, None)) != task_hash("a", [1, 0])
    assert runs.LAYOUT == 1  # to be raised when the layout of runs changes
