"""The loop in one process: what it computes, how it resumes, what it refuses."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from modular_lm.config import TrainConfig, load_config
from modular_lm.config.checks import resolve
from modular_lm.config.schema import TokenizerConfig
from modular_lm.data.dataset import StepRows
from modular_lm.errors import AgreedError
from modular_lm.model.init import init_weights
from modular_lm.model.lm import LanguageModel
from modular_lm.parallel import World, init_world
from modular_lm.tokenizer import build_tokenizer
from modular_lm.tracking.run_folder import RunFolder
from modular_lm.train.inventory import complete_steps, step_folder
from modular_lm.train.trainer import Callbacks, Trainer

G, T = 8, 32
TOKENIZER = build_tokenizer(TokenizerConfig())
BASE = (
    f"steps=12 seed=3 data.seq_len={T} data.batch_size={G} optim.lr=1e-2 optim.warmup=2 "
    "model.dim=16 model.n_layers=2 model.n_heads=2 model.multiple_of=16 model.module_seq_len=8 "
    "model.module_agg=stack model.module_agg_dim=8 distributed.model_dtype=fp32 logging.freq=1 "
    "checkpoint.dump.every=4 checkpoint.dump.keep=-1"
)


def config(*args: str) -> TrainConfig:
    return resolve(load_config(TrainConfig, [*BASE.split(), *args])[0], TOKENIZER.n_words)


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    yield init_world()
    dist.destroy_process_group()


def rows(start: int = 0, stop: int = 12) -> Iterator[StepRows]:
    for step in range(start, stop):
        tokens = np.random.default_rng(step).integers(0, 64, (G, T + 1), dtype=np.uint16)
        yield StepRows(step, np.arange(step * G, (step + 1) * G), tokens)


class Recorder:
    """Callbacks that remember."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.lines: list[dict[str, Any]] = []
        self.saves: list[int] = []
        self.trouble: list[tuple[str, dict[str, Any]]] = []
        self._stop_after = stop_after

    def callbacks(self) -> Callbacks:
        return Callbacks(
            self.lines.append,
            self.lines.append,
            self._saved,
            self._stop,
            lambda _: None,
            lambda kind, fields: self.trouble.append((kind, fields)),
        )

    def _saved(self, saved: dict[str, Any]) -> None:
        self.saves.append(saved["step"])

    def _stop(self) -> str | None:
        return "asked" if len(self.lines) == self._stop_after else None

    @property
    def losses(self) -> list[float]:
        return [line["loss/out"] for line in self.lines]


def trainer(world: World, folder: Path, recorder: Recorder, *args: str, batch: int = G) -> Trainer:
    return Trainer(config(*args), world, RunFolder(folder), TOKENIZER, batch, recorder.callbacks())


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    full = {n: getattr(p, "full_tensor", lambda p=p: p)() for n, p in model.named_parameters()}
    return {n: p.detach().clone() for n, p in full.items()}


def run(world: World, folder: Path, *args: str, stop: int = 12) -> tuple[Recorder, Trainer]:
    recorder = Recorder()
    t = trainer(world, folder, recorder, *args)
    t.run(rows(), stop)
    return recorder, t


def test_the_loss_is_that_of_a_plain_loop_over_the_whole_batch(
    world: World, tmp_path: Path
) -> None:
    recorder, _ = run(world, tmp_path)
    c = config()
    model = LanguageModel(c.model)
    init_weights(model, c.seed)
    decayed = [p for n, p in model.named_parameters() if p.ndim > 1 and "embed" not in n]
    plain = [p for n, p in model.named_parameters() if p.ndim == 1 or "embed" in n]
    optimizer = torch.optim.AdamW(
        [{"params": decayed}, {"params": plain, "weight_decay": 0.0}],
        lr=c.optim.lr, betas=(c.optim.beta1, c.optim.beta2), weight_decay=c.optim.weight_decay,
    )  # fmt: skip
    for line, step in zip(recorder.lines, rows(), strict=True):
        tokens = torch.from_numpy(step.tokens.astype(np.int64))
        loss = model(tokens[:, :-1], tokens[:, 1:]).mean()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), c.optim.clip)
        for group in optimizer.param_groups:
            group["lr"] = line["optim/lr"]
        optimizer.step()
        optimizer.zero_grad()
        assert line["loss/out"] == pytest.approx(loss.item(), rel=1e-6)
        assert line["optim/grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
    assert recorder.losses[-1] < recorder.losses[0]


@pytest.mark.parametrize("micro", [1, 3, 5])
def test_micro_batches_also_ragged_ones_change_nothing(
    world: World, tmp_path: Path, micro: int
) -> None:
    whole, _ = run(world, tmp_path / "whole", stop=4)
    split, _ = run(world, tmp_path / "split", f"data.batch_size={micro}", stop=4)
    assert split.losses == pytest.approx(whole.losses, rel=1e-5)


@pytest.mark.parametrize(
    "extra",
    [
        (),
        ("model.module_seq_len=null",),
        ("model.module_agg=drop",),
        ("optim.name=muon", "optim.lr_multipliers={'aggs.*': 0.5}", "optim.scheduler=wsd"),
    ],
)
def test_resumed_equals_uninterrupted_to_the_bit(
    world: World, tmp_path: Path, extra: tuple[str, ...]
) -> None:
    whole, straight = run(world, tmp_path / "whole", *extra)
    first, _ = run(world, tmp_path / "staged", *extra, stop=8)
    recorder = Recorder()
    second = trainer(world, tmp_path / "staged", recorder, *extra)
    second.resume(8)
    second.run(rows(8), 12)
    assert first.losses + recorder.losses == whole.losses
    left, right = weights(straight.model), weights(second.model)
    assert all(torch.equal(left[n], right[n]) for n in left)


def test_a_resumed_run_takes_its_optimizer_settings_from_the_config(
    world: World, tmp_path: Path
) -> None:
    run(world, tmp_path, stop=4)
    t = trainer(world, tmp_path, Recorder(), "optim.weight_decay=0.7", "optim.beta2=0.5")
    t.resume(4)
    (adamw,) = t.optimizers.parts
    assert [group["weight_decay"] for group in adamw.param_groups] == [0.7, 0.0]
    assert all(group["betas"] == (0.9, 0.5) for group in adamw.param_groups)
    assert all(state["step"] == 4 for state in adamw.state.values())


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_resumed_run_may_have_other_multipliers_and_so_other_groups(
    world: World, tmp_path: Path, name: str
) -> None:
    run(world, tmp_path, f"optim.name={name}", stop=4)
    factors = "optim.lr_multipliers={'aggs.*': 0.5, 'layers.0.*': 0, 'norm.weight': 2}"
    t = trainer(world, tmp_path, Recorder(), f"optim.name={name}", factors)
    t.resume(4)
    before = weights(t.model)
    t.run(rows(4), 5)
    after = weights(t.model)
    still = {n for n in before if torch.equal(before[n], after[n])}
    assert still == {n for n in before if n.startswith("layers.0.")}
    steps = [s["step"] for part in t.optimizers.parts for s in part.state.values() if "step" in s]
    assert steps
    assert {int(step) for step in steps} == {5}


def test_checkpoints_come_when_due_and_at_the_end(world: World, tmp_path: Path) -> None:
    recorder, t = run(world, tmp_path, stop=10)
    assert recorder.saves == [4, 8, 10] == complete_steps(t.folder.checkpoints)


def test_a_stop_request_saves_the_step_it_came_at(world: World, tmp_path: Path) -> None:
    recorder = Recorder(stop_after=3)
    outcome = trainer(world, tmp_path, recorder).run(rows(), 12)
    assert (outcome.status, outcome.step) == ("stopped", 3)
    assert recorder.saves == [3]


def test_rows_of_another_step_are_refused(world: World, tmp_path: Path) -> None:
    with pytest.raises(AgreedError, match=r"step 0, rank 0: expected the samples 0\.\.7"):
        trainer(world, tmp_path, Recorder()).run(rows(1), 12)
    short = iter([dataclasses.replace(next(rows()), index=np.arange(7))])
    with pytest.raises(AgreedError, match="the data stream delivered"):
        trainer(world, tmp_path, Recorder()).run(short, 12)


def test_a_damaged_checkpoint_is_refused_with_the_file(world: World, tmp_path: Path) -> None:
    run(world, tmp_path, stop=4)
    (victim,) = step_folder(tmp_path / "checkpoints", 4).glob("*.distcp")
    victim.write_bytes(victim.read_bytes()[:-1])
    with pytest.raises(AgreedError, match=f"{victim.name}.*truncated"):
        trainer(world, tmp_path, Recorder()).resume(4)


def test_a_checkpoint_that_cannot_be_written_leaves_the_earlier_ones(
    world: World, tmp_path: Path
) -> None:
    _, t = run(world, tmp_path, stop=4)
    # A file where the next checkpoint's folder belongs.
    step_folder(tmp_path / "checkpoints", 8).write_text("")
    with pytest.raises(AgreedError, match="could not be written"):
        t.run(rows(4), 12)
    assert complete_steps(tmp_path / "checkpoints") == [4]


def test_bf16_trains(world: World, tmp_path: Path) -> None:
    recorder, t = run(world, tmp_path, "distributed.model_dtype=bf16")
    assert recorder.losses[-1] < recorder.losses[0]
    assert all(p.dtype == torch.float32 for p in t.model.parameters())


@pytest.mark.parametrize(
    "keys",
    [
        ("model.module_seq_len=null", "model.module_agg=avg"),
        ("model.module_names=code", "model.module_route=code", "model.module_train=all"),
    ],
)
def test_what_never_runs_does_not_disturb_accumulation(
    world: World, tmp_path: Path, keys: tuple[str, ...]
) -> None:
    """Sites of a dense model, the base beside a column: in bf16, with several micro-steps."""
    more = ("distributed.model_dtype=bf16", "data.batch_size=3")
    recorder, _ = run(world, tmp_path, *keys, *more)
    assert recorder.losses[-1] < recorder.losses[0]


def test_documents_of_a_sample_are_kept_apart_if_asked(world: World, tmp_path: Path) -> None:
    (first, *_) = rows()
    first.tokens[:, [9, 20]] = TOKENIZER.bos_id
    losses = []
    for mask in ("true", "false"):
        recorder = Recorder()
        one = trainer(world, tmp_path / mask, recorder, f"data.document_mask={mask}")
        tokens = torch.from_numpy(first.tokens.astype(np.int64))
        documents = (tokens[:, :-1] == TOKENIZER.bos_id).cumsum(1) if mask == "true" else None
        expected = one.model(tokens[:, :-1], tokens[:, 1:], documents).mean().item()
        one.run(iter([first]), 1)
        assert recorder.losses == [pytest.approx(expected, rel=1e-6)]
        losses += recorder.losses
    assert losses[0] != losses[1]


@pytest.mark.parametrize("impl", ["flex", "xformers"])
def test_an_attention_backend_that_cannot_train_here_is_refused(
    impl: str, world: World, tmp_path: Path
) -> None:
    with pytest.raises(AgreedError, match=f"distributed.attn_impl={impl}.*use auto") as caught:
        trainer(
            world, tmp_path, Recorder(), f"distributed.attn_impl={impl}", "model.module_agg=avg"
        )
    assert caught.value.exit_code == 2
