"""Steps that go wrong: skipped and counted, the run ended and dumped, spikes told of."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from modular_lm.data.dataset import StepRows
from modular_lm.errors import EXIT_FAILED, AgreedError
from modular_lm.optim.shards import local_part
from modular_lm.parallel import World, init_world
from modular_lm.train.inventory import complete_steps
from modular_lm.train.stability import SpikeDetector
from modular_lm.train.trainer import Trainer
from tests.pool import Pool
from tests.train.test_trainer import G, Recorder, rows, trainer, weights

POISON = 200  # a token that the random rows do not hold


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    yield init_world()
    dist.destroy_process_group()


def poison(t: Trainer) -> None:
    """Make the model's answer to one token NaN: the only data-dependent fault that is at hand."""
    with torch.no_grad():
        local_part(t.model.tok_embeddings.weight)[POISON] = math.inf


def poisoned_rows(steps: set[int], start: int = 0, stop: int = 12) -> Iterator[StepRows]:
    for step in rows(start, stop):
        if step.step in steps:
            step.tokens[3, 5] = POISON
        yield step


def state(t: Trainer) -> list[torch.Tensor]:
    states = [of_parameter for part in t.optimizers.parts for of_parameter in part.state.values()]
    moments = [tensor for of_parameter in states for tensor in of_parameter.values()]
    return [local_part(x).detach().clone() for x in (*t.model.parameters(), *moments)]


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_bad_batch_changes_nothing_and_is_counted(
    world: World, tmp_path: Path, name: str
) -> None:
    recorder = Recorder()
    t = trainer(world, tmp_path, recorder, f"optim.name={name}", "optim.weight_decay=0.1")
    poison(t)
    stream = poisoned_rows({2, 5})
    t.run(stream, 2)
    before = state(t)
    t.run(stream, 3)
    assert all(torch.equal(a, b) for a, b in zip(before, state(t), strict=True))
    t.run(stream, 12)
    assert not any(torch.equal(a, b) for a, b in zip(before[:3], state(t)[:3], strict=True))
    skipped = [fields for kind, fields in recorder.trouble if kind == "skipped"]
    assert [fields["step"] for fields in skipped] == [3, 6]
    assert [fields["samples"] for fields in skipped] == [[2 * G, 3 * G - 1], [5 * G, 6 * G - 1]]
    assert [fields["in_a_row"] for fields in skipped] == [1, 1]
    assert all(math.isnan(fields["loss"]) for fields in skipped)
    assert [line["optim/skipped"] for line in recorder.lines] == [0] * 2 + [1] * 3 + [2] * 7
    assert [math.isnan(loss) for loss in recorder.losses] == [s in {2, 5} for s in range(12)]


def test_too_many_in_a_row_end_the_run_with_a_dump_and_it_can_be_continued(
    world: World, tmp_path: Path
) -> None:
    recorder = Recorder()
    keys = ("optim.max_skipped=3", "checkpoint.dump.every=2", "logging.freq=100")
    t = trainer(world, tmp_path, recorder, *keys)
    poison(t)
    with pytest.raises(AgreedError, match=r"steps 6\.\.8: .*optim\.max_skipped=3") as caught:
        t.run(poisoned_rows({2, 5, 6, 7, 8}), 12)
    assert caught.value.exit_code == EXIT_FAILED
    assert [fields["step"] for _, fields in recorder.trouble] == [3, 6, 7, 8]
    dump = tmp_path / "dumps" / "0000000008"
    assert str(dump) in str(caught.value)
    about = json.loads((dump / "about.json").read_text())
    assert (about["step"], about["samples"]) == (8, [7 * G, 8 * G - 1])
    assert len(about["loss_of_rank"]) == 1
    assert math.isnan(about["loss_of_rank"][0])
    with np.load(dump / "rank_00000.npz") as saved:
        (expected,) = poisoned_rows({7}, 7, 8)
        assert np.array_equal(saved["index"], expected.index)
        assert np.array_equal(saved["tokens"], expected.tokens)
    # None was written while steps were skipped; what there is goes on.
    assert complete_steps(tmp_path / "checkpoints") == [2, 4]
    recorder = Recorder()
    again = trainer(world, tmp_path, recorder, "optim.max_skipped=3")
    again.resume(4)
    again.run(rows(4), 12)
    assert recorder.lines[-1]["optim/skipped"] == 1
    assert all(math.isfinite(loss) for loss in recorder.losses)


def test_a_dump_that_cannot_be_written_does_not_hide_why_the_run_ended(
    world: World, tmp_path: Path
) -> None:
    (tmp_path / "dumps").write_text("a file where the folder belongs")
    t = trainer(world, tmp_path, Recorder(), "optim.max_skipped=2")
    poison(t)
    said = r"steps 2\.\.3: .*not finite 2 times.*could not be written \(.*Not a directory\)"
    with pytest.raises(AgreedError, match=said) as caught:
        t.run(poisoned_rows({1, 2}), 12)
    assert caught.value.exit_code == EXIT_FAILED


def test_an_absurd_learning_rate_ends_in_a_stop_not_in_broken_weights(
    world: World, tmp_path: Path
) -> None:
    keys = ("optim.lr=1e30", "optim.warmup=0", "optim.max_skipped=2", "optim.clip=1e30")
    t = trainer(world, tmp_path, Recorder(), *keys)
    with pytest.raises(AgreedError, match="not finite 2 times in a row"):
        t.run(rows(), 12)
    assert all(w.isfinite().all() for w in weights(t.model).values())


def test_a_spike_is_told_of_once_and_a_new_level_is_the_norm_after_a_while() -> None:
    random = np.random.default_rng(0)
    detector = SpikeDetector(64, 8.0)
    falling = [5 * 0.97**i + 2 + 0.02 * random.standard_normal() for i in range(200)]
    assert [detector.see(loss) for loss in falling] == [None] * 200
    level = float(np.median(falling[-64:]))
    spike = detector.see(level + 1)
    assert spike is not None
    assert spike.median == pytest.approx(level)
    assert spike.deviation == pytest.approx(0.02, rel=0.6)
    assert detector.see(level + 1.5) is None, "the same one still"
    assert [detector.see(level) for _ in range(3)] == [None] * 3
    assert detector.see(level + 1) is not None, "a new one"
    shifted = [detector.see(level + 1 + 0.02 * random.standard_normal()) for _ in range(80)]
    assert shifted == [None] * 80
    assert detector.see(level + 1.01) is None


def test_no_spikes_without_a_window_or_before_there_is_a_norm() -> None:
    off = SpikeDetector(0, 8.0)
    assert [off.see(loss) for loss in (1.0, 1.1, 50.0) * 20] == [None] * 60
    early = SpikeDetector(128, 8.0)
    assert [early.see(loss) for loss in (1.0, 1.1) * 5 + (50.0,)] == [None] * 11


def test_a_spike_in_training_is_an_event_with_its_samples_and_counted(
    world: World, tmp_path: Path
) -> None:
    recorder = Recorder()
    keys = ("steps=60", "optim.spike_window=16", "checkpoint.dump.every=0")
    t = trainer(world, tmp_path, recorder, *keys)

    def stream() -> Iterator[StepRows]:
        for step in rows(0, 60):
            if step.step == 50:
                step.tokens[:] = 250  # never seen before, while the others' frequency is learned
            yield step

    t.run(stream(), 52)
    (event,) = recorder.trouble
    kind, fields = event
    assert (kind, fields["step"], fields["samples"]) == ("spike", 51, [50 * G, 51 * G - 1])
    assert fields["loss"] == recorder.losses[50] > fields["median"] + 8 * fields["deviation"]
    assert [line["optim/spikes"] for line in recorder.lines] == [0] * 50 + [1] * 2


# ------------------------------------------------------------------ several ranks


def one_bad_rank(folder: Path) -> tuple[str, list[int], bool]:
    """What each rank says of a run in which only the first one meets a bad row."""
    world, recorder = init_world(use_gpu=False), Recorder()
    keys = ("optim.max_skipped=2", "checkpoint.dump.every=0", "data.batch_size=2")
    t = trainer(world, folder, recorder, *keys)
    with torch.no_grad():  # the row of the poisonous token, which may lie on any rank
        weight = t.model.tok_embeddings.weight
        first = (world.rank * len(local_part(weight))) if world.size > 1 else 0
        if first <= POISON < first + len(local_part(weight)):
            local_part(weight)[POISON - first] = math.inf

    def stream() -> Iterator[StepRows]:
        for step in poisoned_rows({1, 3, 4}):
            mine = slice(G // world.size * world.rank, G // world.size * (world.rank + 1))
            yield StepRows(step.step, step.index[mine], step.tokens[mine])

    with pytest.raises(AgreedError) as caught:
        t.run(stream(), 12)
    finite = all(local_part(p).isfinite().all() for p in list(t.model.parameters())[1:])
    return str(caught.value), [fields["step"] for _, fields in recorder.trouble], finite


@pytest.mark.slow
def test_all_ranks_skip_what_one_of_them_cannot_use(pool: Pool, tmp_path: Path) -> None:
    told = pool.run(2, one_bad_rank, tmp_path)
    assert told[0] == told[1]
    message, skipped, finite = told[0]
    assert message.startswith("steps 4..5: loss or gradient was not finite 2 times in a row")
    assert skipped == [2, 4, 5]
    assert finite
    dump = tmp_path / "dumps" / "0000000005"
    about = json.loads((dump / "about.json").read_text())
    assert [math.isnan(loss) for loss in about["loss_of_rank"]] == [True, False]
    files = [np.load(dump / f"rank_0000{rank}.npz") for rank in range(2)]
    assert np.concatenate([file["index"] for file in files]).tolist() == [*range(4 * G, 5 * G)]
