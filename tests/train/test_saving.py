"""What is written while training goes on, what stays when a write fails, what is kept."""

from __future__ import annotations

import errno
import json
import os
import shutil
import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import given
from hypothesis import strategies as st

from modular_lm.data.dataset import StepRows
from modular_lm.errors import AgreedError
from modular_lm.parallel import World, init_world
from modular_lm.train import saving
from modular_lm.train.checkpoint import load_for_inference
from modular_lm.train.inventory import COMPLETE, complete_steps, read_complete, step_folder
from modular_lm.train.saving import HostCopy
from modular_lm.train.tensor_files import write_tensors
from tests.train.ranks_worker import state_digests
from tests.train.test_trainer import Recorder, rows, trainer, weights

pytestmark = pytest.mark.timeout(120)  # a save that is waited for in vain hangs
Write = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    yield init_world()
    dist.destroy_process_group()


def write_through(monkeypatch: pytest.MonkeyPatch, before: Callable[[Path], Any]) -> None:
    """Have `before` called with the folder by every writing thread."""

    def write(folder: Path, *args: Any) -> dict[str, Any]:
        before(folder)
        return write_tensors(folder, *args)

    monkeypatch.setattr(saving, "write_tensors", write)


class Watching(Recorder):
    """Calls `act` after each line of metrics."""

    def __init__(self, act: Callable[[int], None]) -> None:
        super().__init__()
        self._act = act

    def _stop(self) -> str | None:
        self._act(len(self.lines))
        return None


@pytest.mark.parametrize("agg", ["stack", "drop"])
def test_training_past_the_copy_does_not_change_what_is_written(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, agg: str
) -> None:
    args = (f"model.module_agg={agg}",)
    plain = trainer(world, tmp_path / "plain", Recorder(), *args, "checkpoint.async_save=false")
    plain.run(rows(), 4)

    written = threading.Event()
    write_through(monkeypatch, lambda folder: written.wait(60))
    # Three steps later, all of them done while the checkpoint waits.
    recorder = Watching(lambda steps: written.set() if steps == 7 else None)
    trained = trainer(world, tmp_path / "async", recorder, *args)
    trained.run(rows(), 8)
    assert recorder.saves == [4, 8]

    monkeypatch.undo()
    found = trainer(world, tmp_path / "async", Recorder(), *args)
    found.resume(4)
    assert state_digests(found) == state_digests(plain)
    assert state_digests(trained) != state_digests(plain)


def test_a_checkpoint_is_complete_only_after_the_write(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[int, list[int]] = {}
    written = threading.Event()
    write_through(monkeypatch, lambda folder: written.wait(60))

    def look(steps: int) -> None:
        seen[steps] = complete_steps(tmp_path / "checkpoints")
        if steps == 6:
            written.set()

    recorder = Watching(look)
    trainer(world, tmp_path, recorder).run(rows(), 7)
    assert seen[5] == seen[6] == []
    assert complete_steps(tmp_path / "checkpoints") == recorder.saves == [4, 7]


def test_never_two_writes_at_once_and_each_waits_for_the_one_before(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    running, most = [], []

    def enter(folder: Path) -> None:
        running.append(folder)
        most.append(len(running))

    def write(folder: Path, *args: Any) -> dict[str, Any]:
        enter(folder)
        try:
            return write_tensors(folder, *args)
        finally:
            running.remove(folder)

    monkeypatch.setattr(saving, "write_tensors", write)
    recorder = Recorder()
    trainer(world, tmp_path, recorder, "checkpoint.dump.every=1").run(rows(), 6)
    assert recorder.saves == [1, 2, 3, 4, 5, 6] == complete_steps(tmp_path / "checkpoints")
    assert most == [1] * 6


def test_a_failed_write_is_told_while_training_goes_on_and_leaves_the_earlier_ones(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fill(folder: Path) -> None:
        if folder.name.endswith("8"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "__0_0.distcp")

    write_through(monkeypatch, fill)
    recorder = Recorder()
    failing = trainer(world, tmp_path, recorder)
    with pytest.raises(AgreedError, match=r"0000000008 could not be written: .*No space left"):
        failing.run(rows(), 12)
    assert len(recorder.lines) >= 8
    assert complete_steps(tmp_path / "checkpoints") == recorder.saves == [4]
    monkeypatch.undo()
    again = trainer(world, tmp_path, recorder)
    again.resume(4)
    again.run(rows(4), 12)
    assert recorder.saves == [4, 8, 12] == complete_steps(tmp_path / "checkpoints")


def test_a_write_under_way_ends_well_when_training_fails(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = threading.Event()
    write_through(monkeypatch, lambda folder: written.wait(60))

    def until_five() -> Iterator[StepRows]:
        yield from rows(0, 5)
        written.set()
        yield from rows(7)

    with pytest.raises(AgreedError, match="step 5, rank 0: expected the samples"):
        trainer(world, tmp_path, Recorder()).run(until_five(), 12)
    assert complete_steps(tmp_path / "checkpoints") == [4]


def test_the_event_says_how_long_training_waited(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[dict[str, Any]] = []
    written = threading.Event()
    write_through(monkeypatch, lambda folder: written.wait(60))
    for mode in ("true", "false"):
        recorder = Watching(lambda steps: written.set() if steps == 6 else None)
        recorder._saved = events.append  # type: ignore[method-assign]
        trainer(world, tmp_path / mode, recorder, f"checkpoint.async_save={mode}").run(rows(), 7)
    beside, last, *blocking = events
    assert 0 < beside["seconds_blocked"] < beside["seconds"]
    assert last["seconds_blocked"] > 0
    for waited in blocking:
        assert waited["seconds_blocked"] >= waited["seconds"] > 0
    folder = step_folder(tmp_path / "true" / "checkpoints", 4)
    sizes = {p.name: p.stat().st_size for p in folder.iterdir() if p.name != COMPLETE}
    assert beside["bytes"] == sum(sizes.values())
    assert {n: e["bytes"] for n, e in read_complete(folder)["files"].items()} == sizes


# ------------------------------------------------------------------ what is kept


def test_rolling_checkpoints_never_pile_up(world: World, tmp_path: Path) -> None:
    """One is due at every step here; the newest is there until there is a newer one of any kind."""
    seen: dict[int, list[int]] = {}

    def look(steps: int) -> None:
        if steps:
            seen[steps] = complete_steps(tmp_path / "checkpoints")

    keys = ("checkpoint.rolling.minutes=1e-9", "checkpoint.async_save=false")
    recorder = Watching(look)
    recorder._stop_after = None
    trainer(world, tmp_path, recorder, *keys).run(rows(), 10)
    assert recorder.saves == [*range(1, 11)]
    assert seen[3] == [2]
    assert seen[6] == [4, 5]
    assert complete_steps(tmp_path / "checkpoints") == [4, 8, 10]


def test_a_stop_leaves_a_rolling_checkpoint(world: World, tmp_path: Path) -> None:
    trainer(world, tmp_path, Recorder(stop_after=3)).run(rows(), 12)
    assert read_complete(step_folder(tmp_path / "checkpoints", 3))["rolling"]
    going_on = trainer(world, tmp_path, Recorder())
    going_on.resume(3)
    going_on.run(rows(3), 8)
    assert complete_steps(tmp_path / "checkpoints") == [4, 8]


def test_without_a_limit_on_lost_work_there_are_no_rolling_ones(
    world: World, tmp_path: Path
) -> None:
    recorder = Recorder()
    trainer(world, tmp_path, recorder, "checkpoint.rolling.minutes=0").run(rows(), 8)
    assert recorder.saves == [4, 8]


# ------------------------------------------------------------------ loading


def test_random_numbers_go_on_where_they_were(world: World, tmp_path: Path) -> None:
    torch.manual_seed(5)
    trainer(world, tmp_path, Recorder()).run(rows(), 4)
    expected = torch.rand(3)
    torch.manual_seed(6)
    found = trainer(world, tmp_path, Recorder())
    found.resume(4)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ("model.dim=32", r"another one: model\.dim: 16 there, 32 here; .*set these keys as in its"),
        ("model.n_layers=3", r"model\.n_layers: 2 there, 3 here"),
        ("model.module_agg=drop", r"model\.module_agg: stack there, drop here"),
        ("model.module_agg_dim=4", r"model\.module_agg_dim: 8 there, 4 here"),
        ("model.module_names=code", r"model\.module_names: none there, code here"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused_by_name(
    world: World, tmp_path: Path, changed: str, named: str
) -> None:
    trainer(world, tmp_path, Recorder()).run(rows(), 4)
    with pytest.raises(AgreedError, match=named) as caught:
        trainer(world, tmp_path, Recorder(), changed).resume(4)
    assert caught.value.exit_code == 2


def test_a_checkpoint_without_an_optimizer_is_not_continued(world: World, tmp_path: Path) -> None:
    trainer(world, tmp_path, Recorder()).run(rows(), 4)
    folder = step_folder(tmp_path / "checkpoints", 4)
    listing = json.loads((folder / COMPLETE).read_text())
    del listing["files"]["train_state.json"]
    (folder / COMPLETE).write_text(json.dumps(listing))
    (folder / "train_state.json").unlink()
    with pytest.raises(AgreedError, match=r"a model alone.*checkpoint\.init_ckpt_path"):
        trainer(world, tmp_path, Recorder()).resume(4)


@pytest.mark.parametrize("damage", ["missing", "truncated", "altered", "listing"])
def test_a_damaged_newest_checkpoint_says_how_to_go_on(
    world: World, tmp_path: Path, damage: str
) -> None:
    trainer(world, tmp_path, Recorder()).run(rows(), 8)
    folder = step_folder(tmp_path / "checkpoints", 8)
    victim = folder / (COMPLETE if damage == "listing" else "__0_0.distcp")
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    if damage == "missing":
        victim.unlink()
    else:
        victim.write_bytes(content if damage == "altered" else content[:-9])
    with pytest.raises(AgreedError) as caught:
        trainer(world, tmp_path, Recorder()).resume(8)
    message = str(caught.value)
    assert f"{victim}: " in message
    assert message.endswith(f"delete {folder} to go on from the checkpoint before (that of step 4)")
    shutil.rmtree(folder)
    trainer(world, tmp_path, Recorder()).resume(4)


# ------------------------------------------------------------------ the copy

TENSORS = st.sampled_from([torch.float32, torch.bfloat16, torch.int64]).flatmap(
    lambda dtype: st.lists(st.integers(0, 4), max_size=3).map(
        lambda shape: torch.full(shape, 3, dtype=dtype)
    )
)
STATES = st.recursive(
    TENSORS | st.integers() | st.floats(allow_nan=False) | st.tuples(st.floats(0, 1)),
    lambda inner: st.dictionaries(st.sampled_from("abcd"), inner, max_size=4),
    max_leaves=8,
).filter(lambda state: isinstance(state, dict))


def overwrite(state: Any, value: int) -> None:
    for inner in state.values():
        if isinstance(inner, dict):
            overwrite(inner, value)
        elif isinstance(inner, torch.Tensor):
            inner.fill_(value)


def same(left: Any, right: Any) -> bool:
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[k], right[k]) for k in left)
    if isinstance(left, torch.Tensor):
        return left.dtype == right.dtype and torch.equal(left, right)
    return left == right


@given(STATES)
def test_a_copy_shares_nothing_and_its_memory_is_used_again(state: dict[str, Any]) -> None:
    to_host = HostCopy(pinned=False)
    first = to_host(state)
    assert same(first, state)
    overwrite(state, 7)
    assert same(first, to_host(state)), "the same memory"
    assert same(first, state)
    copied = to_host(state)
    overwrite(state, 9)
    overwrite(copied, 8)
    assert same(copied, first)


# ------------------------------------------------------------------ an object store


def test_a_run_in_an_object_store_resumes_to_the_bit(world: World, tmp_path: Path) -> None:
    keys = (f"checkpoint.path=memory://{uuid.uuid4().hex}/run", "checkpoint.dump.keep=2")
    whole = trainer(world, tmp_path / "whole", Recorder())
    whole.run(rows(), 12)
    first = trainer(world, tmp_path / "remote", Recorder(), *keys)
    first.run(rows(), 10)
    assert complete_steps(first.checkpoints) == [8, 10]
    second = trainer(world, tmp_path / "remote", Recorder(), *keys)
    second.resume(8)
    second.run(rows(8), 12)
    assert state_digests(second) == state_digests(whole)
    assert complete_steps(second.checkpoints) == [10, 12]
    assert not (tmp_path / "remote" / "checkpoints").exists()
    found, _, config, folder = load_for_inference(str(second.checkpoints))
    assert str(folder) == f"{config.checkpoint.path}/0000000012"
    assert all(torch.equal(t, found.state_dict()[n]) for n, t in weights(whole.model).items())


def test_a_store_that_fails_fails_the_save_with_its_name(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = f"memory://{uuid.uuid4().hex}/run"
    failing = trainer(world, tmp_path, Recorder(), f"checkpoint.path={uri}")
    steps = rows()
    failing.run(steps, 4)

    def refuse(self: Any, path: str, mode: str = "rb", **kwargs: Any) -> Any:
        raise ConnectionError("connection reset by peer")

    monkeypatch.setattr(MemoryFileSystem, "_open", refuse)
    with pytest.raises(AgreedError, match=f"{uri}/0000000008.*fails: connection reset by peer"):
        failing.run(steps, 8)
    monkeypatch.undo()
    assert complete_steps(failing.checkpoints) == [4]
