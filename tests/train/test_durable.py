"""A checkpoint is on the disk before `COMPLETE` says so: the machine may crash."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from modular_lm.config import TrainConfig, load_config
from modular_lm.config.checks import resolve
from modular_lm.config.schema import TokenizerConfig
from modular_lm.parallel import World, init_world
from modular_lm.tokenizer import build_tokenizer
from modular_lm.tracking.run_folder import RunFolder
from modular_lm.train.inventory import COMPLETE, step_folder
from modular_lm.train.tensor_files import write_tensors
from modular_lm.train.trainer import Trainer
from tests.train.test_trainer import BASE, G, Recorder, rows

Synced = dict[int, tuple[int, int]]  # inode -> how many were synced before it, its size then


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    yield init_world()
    dist.destroy_process_group()


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> Synced:
    """Of every file and folder that is synced from here on, the last time."""
    found: Synced = {}
    calls: list[int] = []
    fsync = os.fsync

    def sync(descriptor: int) -> None:
        about = os.fstat(descriptor)
        found[about.st_ino] = (len(calls), about.st_size)
        calls.append(descriptor)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", sync)
    return found


def test_a_checkpoint_is_on_the_disk_before_its_complete_file(
    world: World, tmp_path: Path, synced: Synced, shared_data: Path
) -> None:
    path = shared_data / "golden" / "stories260K" / "tok512.model"
    tokenizer = build_tokenizer(TokenizerConfig("sp", str(path)))
    c = resolve(load_config(TrainConfig, BASE.split())[0], tokenizer.n_words)
    callbacks = Recorder().callbacks()
    Trainer(c, world, RunFolder(tmp_path), tokenizer, G, callbacks).run(rows(), 1)

    folder = step_folder(tmp_path / "checkpoints", 1)
    files = {file.name: file.stat() for file in folder.iterdir()}
    complete, _ = synced[files.pop(COMPLETE).st_ino]
    assert {".metadata", "__0_0.distcp", "params.json", "tokenizer.model"} < files.keys()
    for name, about in files.items():
        when, size = synced[about.st_ino]
        assert size == about.st_size, name
        assert when < complete, name
    assert synced[folder.parent.stat().st_ino][0] < complete, "the folder's own name"


@pytest.mark.parametrize("tensors", [1, 30, 400])
def test_files_are_synced_with_their_last_byte(
    tmp_path: Path, synced: Synced, tensors: int
) -> None:
    """Also where what is written fits into the buffer of its stream."""
    write_tensors(tmp_path, {f"t{i}": torch.zeros(3) for i in range(tensors)})
    for file in tmp_path.iterdir():
        about = file.stat()
        assert synced[about.st_ino][1] == about.st_size, file.name
