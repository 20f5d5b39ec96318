"""Runs that add a column to a trained model, go on with it, or train one further."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from modular_lm.config import TrainConfig, load_config
from modular_lm.config.checks import warnings_of
from modular_lm.config.schema import TokenizerConfig
from modular_lm.data.dataset import StepRows
from modular_lm.errors import CheckpointError, ConfigError
from modular_lm.eval.perplexity import Validation
from modular_lm.model.lm import LanguageModel
from modular_lm.parallel import World, init_world
from modular_lm.tokenizer import build_tokenizer
from modular_lm.tracking.run_folder import RunFolder
from modular_lm.train.checkpoint import load_for_inference
from modular_lm.train.column_file import base_hash
from modular_lm.train.inventory import step_folder
from modular_lm.train.run import open_run, resolve_config
from modular_lm.train.saved_config import read_config
from modular_lm.train.trainer import Callbacks, Trainer
from tests.eval.held_out import random_documents, write_held_out

G, T = 4, 32
TOKENIZER = build_tokenizer(TokenizerConfig())
BASE = (
    f"steps=6 seed=3 data.seq_len={T} data.batch_size={G} optim.lr=1e-2 optim.warmup=0 "
    "model.dim=16 model.n_layers=2 model.n_heads=2 model.multiple_of=16 model.module_agg_dim=8 "
    "model.module_agg=stack model.module_seq_len=8 distributed.model_dtype=fp32 logging.freq=1 "
    "checkpoint.dump.every=2 checkpoint.dump.keep=-1 logging.mlflow.enabled=false"
)
Weights = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    yield init_world()
    dist.destroy_process_group()


def given_config(folder: Path, *args: str) -> TrainConfig:
    return load_config(TrainConfig, [*BASE.split(), f"dump_dir={folder}", *args])[0]


def config(folder: Path, *args: str) -> TrainConfig:
    """As a job resolves it."""
    return resolve_config(given_config(folder, *args))[0]


def rows(start: int = 0) -> Iterator[StepRows]:
    for step in range(start, 6):
        tokens = np.random.default_rng(step).integers(0, 64, (G, T + 1), dtype=np.uint16)
        yield StepRows(step, np.arange(step * G, (step + 1) * G), tokens)


def train(
    world: World, folder: Path, *args: str, start: int = 0, stop: int = 6
) -> tuple[Trainer, list[float]]:
    """What a command does in this process; returns the losses of its steps."""
    losses: list[float] = []

    def metrics(line: dict[str, Any]) -> None:
        losses.append(line["loss/out"])

    callbacks = Callbacks(
        metrics, lambda _: None, lambda _: None, lambda: None, lambda _: None, lambda *_: None
    )
    trainer = Trainer(config(folder, *args), world, RunFolder(folder), TOKENIZER, G, callbacks)
    trainer.resume(start)
    trainer.run(rows(start), stop)
    return trainer, losses


def stored(folder: Path, step: int = 6) -> Weights:
    return dict(loaded(folder, step).state_dict())


def loaded(folder: Path, step: int = 6) -> LanguageModel:
    path = step_folder(folder / "checkpoints", step)
    return load_for_inference(str(path), torch.device("cpu"))[0]


def moved(before: Weights, after: Weights) -> set[str]:
    """What has changed: "base", a column's name, or "shared"; each wholly or not at all."""
    found: dict[str, set[bool]] = {}
    for name, tensor in before.items():
        part = "base" if name.startswith("layers.") else "shared"
        part = name.split(".")[1] if name.startswith("columns.") else part
        found.setdefault(part, set()).add(torch.equal(tensor, after[name]))
    assert all(len(each) == 1 for each in found.values()), found
    return {part for part, same in found.items() if same == {False}}


@pytest.fixture(scope="module")
def trained(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the base alone."""
    folder = tmp_path_factory.mktemp("base")
    train(world, folder)
    return folder


@pytest.fixture(scope="module")
def coded(world: World, trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that added the column `code` to it."""
    folder = tmp_path_factory.mktemp("code")
    train(world, folder, *adding(trained))
    return folder


def adding(source: Path, name: str = "code", *more: str) -> tuple[str, ...]:
    keys = (f"model.create_module_name={name}", f"checkpoint.init_ckpt_path={source}")
    return (*keys, *more)


def nll(model: LanguageModel, route: str, held_out: Path, world: World) -> float:
    model.config.module_route = route
    folders = {"x": held_out}
    scores = Validation(folders, TOKENIZER, T, max_docs=6, batch_size=2, chunk_len=8)
    return scores.score(model, world).metrics["validation/x/nll"]


def test_a_new_column_learns_and_the_base_stays_to_the_bit(
    world: World, trained: Path, coded: Path, tmp_path: Path
) -> None:
    base, grown = stored(trained), stored(coded)
    assert all(torch.equal(grown[name], tensor) for name, tensor in base.items())
    copies = {f"columns.code.{name}": t for name, t in base.items() if name.startswith("layers.")}
    assert grown.keys() == base.keys() | copies.keys()
    assert base_hash(loaded(coded)) == base_hash(loaded(trained)), "its column fits the base"
    assert moved(copies, grown) == {"code"}
    text = tmp_path / "text"
    write_held_out(text, random_documents((40, 20, 30), 64), TOKENIZER)
    before, after = loaded(trained), loaded(coded)
    assert nll(after, "base", text, world) == nll(before, "base", text, world)
    assert nll(after, "code", text, world) != nll(before, "base", text, world)
    model = read_config(step_folder(coded / "checkpoints", 6)).model
    assert (model.module_names, model.module_route, model.module_train) == (["code"], "code", "new")


def test_a_copy_starts_at_the_loss_of_the_base_and_a_fresh_one_above(
    world: World, trained: Path, tmp_path: Path
) -> None:
    drawn = torch.from_numpy(next(rows()).tokens.astype(np.int64))
    with torch.no_grad():
        expected = loaded(trained)(drawn[:, :-1], drawn[:, 1:]).mean().item()
    _, copied = train(world, tmp_path / "copy", *adding(trained), stop=4)
    assert copied[0] == pytest.approx(expected, rel=1e-6)
    keys = ("model.create_module_init=fresh",)
    _, fresh = train(world, tmp_path / "fresh", *adding(trained, "code", *keys), stop=4)
    assert fresh[0] > copied[0] + 0.01
    weights = stored(tmp_path / "fresh", 4)
    assert moved(stored(trained), weights) == set()
    assert weights["columns.code.layers.1.attention.wo.weight"].abs().max() > 0


@pytest.mark.parametrize("more", [(), ("model.module_train=all", "model.create_module_init=fresh")])
def test_a_resumed_run_equals_an_uninterrupted_one_though_its_start_is_gone(
    world: World, trained: Path, tmp_path: Path, more: tuple[str, ...]
) -> None:
    source = tmp_path / "source"
    shutil.copytree(trained, source)
    keys = adding(source, "code", *more)
    _, whole = train(world, tmp_path / "whole", *keys)
    _, first = train(world, tmp_path / "staged", *keys, stop=4)
    shutil.rmtree(source)
    _, second = train(world, tmp_path / "staged", *keys, start=4)
    assert first + second == whole
    left, right = stored(tmp_path / "whole"), stored(tmp_path / "staged")
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_all_learns_what_is_shared_but_not_the_layers_of_the_base(
    world: World, trained: Path, tmp_path: Path
) -> None:
    keys = adding(trained, "code", "model.module_train=all")
    train(world, tmp_path, *keys)
    assert moved(stored(trained), stored(tmp_path)) == {"shared"}
    assert moved(stored(tmp_path, 2), stored(tmp_path)) == {"shared", "code"}


def test_a_column_is_trained_further_and_another_added(
    world: World, coded: Path, tmp_path: Path
) -> None:
    start = f"checkpoint.init_ckpt_path={coded}"
    further, _ = train(world, tmp_path / "further", start, "model.module_route=code", stop=2)
    assert further.config.model.module_names == ["code"]
    assert moved(stored(coded), stored(tmp_path / "further", 2)) == {"code"}

    second, _ = train(world, tmp_path / "law", *adding(coded, "law"), stop=2)
    assert second.config.model.module_names == ["code", "law"]
    before, after = stored(coded), stored(tmp_path / "law", 2)
    assert moved(before, after) == set()
    assert {n.split(".")[1] for n in after.keys() - before.keys()} == {"law"}

    base, _ = train(world, tmp_path / "again", start, stop=2)
    assert base.config.model.module_route == "base"
    assert moved(stored(coded), stored(tmp_path / "again", 2)) == {"base", "shared"}


# ------------------------------------------------------------------ configs


@pytest.fixture
def builtin(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODULAR_LM_CACHE", str(cache))


def test_a_resolved_config_resolves_to_itself(coded: Path, tmp_path: Path) -> None:
    keys = adding(coded, "law")
    names = config(tmp_path, *keys).model.module_names
    again = config(tmp_path, *keys, f"model.module_names=[{','.join(names)}]")
    assert again == config(tmp_path, *keys)


def test_a_run_that_goes_on_keeps_its_columns(
    trained: Path, coded: Path, tmp_path: Path, builtin: None
) -> None:
    keys = adding(trained)
    run = open_run(*resolve_config(given_config(tmp_path / "run", *keys)), 1)
    run.begin({})
    shutil.copytree(step_folder(coded / "checkpoints", 6), step_folder(run.folder.checkpoints, 2))
    again = open_run(*resolve_config(given_config(tmp_path / "run", *keys)), 1)
    assert (again.is_new, again.config.model.module_names) == (False, ["code"])
    for changed, message in (
        (adding(trained, "law"), "model.create_module_name: code -> law"),
        ((f"checkpoint.init_ckpt_path={trained}",), "model.create_module_name: code -> None"),
        ((*keys, "model.module_train=all"), "model.module_train: new -> all"),
    ):
        with pytest.raises(ConfigError, match=message):
            open_run(*resolve_config(given_config(tmp_path / "run", *changed)), 1)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("model.create_module_name=law", "model.create_module_name=law: a column is added to a"),
        (
            "model.create_module_name=code START",
            "model.create_module_name=code: checkpoint.init_ckpt_path=CODED has this column "
            "already; choose another name, or train it further with model.module_route=code",
        ),
        ("model.module_route=auto START", "model.module_route=auto: training runs all chunks"),
        ("model.module_route=law START", "model.module_route=law: expected a column: base, code"),
        ("model.module_route=code", "model.module_route=code: expected a column: base"),
        (
            "model.module_names=law START",
            "model.module_names=law: a new run has the columns of "
            "checkpoint.init_ckpt_path=CODED (code); leave this key out",
        ),
        ("model.module_names=[a]", "model.module_names=a: a new run has the columns of"),
        ("model.create_module_name=base START", "model.create_module_name=base: PyTorch or"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_starts(
    coded: Path, tmp_path: Path, args: str, message: str
) -> None:
    start = f"checkpoint.init_ckpt_path={coded}"
    with pytest.raises(ConfigError) as caught:
        config(tmp_path / "run", *args.replace("START", start).split())
    assert str(caught.value).replace(str(coded), "CODED").startswith(message)
    assert not (tmp_path / "run").exists()


def test_a_start_that_is_gone_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"^checkpoint\.init_ckpt_path=\S+: no such folder"):
        config(tmp_path / "run", *adding(tmp_path / "gone"))


def test_training_what_is_shared_beside_other_columns_is_warned_of(
    trained: Path, coded: Path, tmp_path: Path
) -> None:
    def warned(*args: str) -> list[str]:
        return warnings_of(config(tmp_path, *args))

    (line,) = warned(*adding(coded, "law", "model.module_train=all"))
    assert line.startswith("model.module_train=all: what all columns share learns")
    assert "outputs of base, code change" in line
    assert "outputs of code change" in warned(f"checkpoint.init_ckpt_path={coded}")[0]
    for quiet in (adding(coded, "law"), (f"checkpoint.init_ckpt_path={trained}",), ()):
        assert warned(*quiet) == []


@pytest.mark.parametrize(
    "key", ["module_lookback=4", "module_pool=last", "module_n_summary=2", "module_seq_len=16"]
)
def test_a_column_is_added_to_a_base_that_goes_on_computing_the_same(
    trained: Path, tmp_path: Path, key: str, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ConfigError, match=f"another one: model.{key.split('=')[0]}: .* there, "):
        config(tmp_path / "run", *adding(trained), f"model.{key}")
    # Without a column a run may use its initial weights otherwise; it is told that it does.
    config(tmp_path / "run", f"checkpoint.init_ckpt_path={trained}", f"model.{key}")
    assert f"was trained with model.{key.split('=')[0]}" in caplog.text


def test_the_scale_of_a_sum_goes_with_the_weights(world: World, tmp_path: Path) -> None:
    """Resolved by default for the samples of the first run, it would change with their length."""
    train(world, tmp_path / "base", "model.module_agg=sum", stop=2)
    longer = ("model.module_agg=sum", "data.seq_len=64")
    start = f"checkpoint.init_ckpt_path={tmp_path / 'base'}"
    assert config(tmp_path / "run", *longer).model.module_sum_scale == 1 / 8
    assert config(tmp_path / "run", start, *longer).model.module_sum_scale == 1 / 4
    given = config(tmp_path / "run", start, *longer, "model.module_sum_scale=0.5")
    assert given.model.module_sum_scale == 0.5
    # Continued, the run keeps it, though its start may be gone.
    train(world, tmp_path / "run", start, "model.module_agg=sum", stop=2)
    shutil.rmtree(tmp_path / "base")
    assert config(tmp_path / "run", "model.module_agg=sum").model.module_sum_scale == 1 / 4
