"""Checkpoints of a model alone, and runs that start from the weights of another checkpoint."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from modular_lm.config import ModelConfig, TrainConfig, load_config
from modular_lm.config.checks import changes, resolve, resolve_model
from modular_lm.config.schema import TokenizerConfig
from modular_lm.data.dataset import StepRows
from modular_lm.errors import AgreedError, CheckpointError, ConfigError, RunFailedError
from modular_lm.model.hf import read_hf
from modular_lm.model.init import init_weights
from modular_lm.model.lm import LanguageModel
from modular_lm.parallel import World, build_model, init_world
from modular_lm.tokenizer import build_tokenizer
from modular_lm.tracking.run_folder import RunFolder
from modular_lm.train.checkpoint import load_for_inference, load_model, stored_shapes
from modular_lm.train.inventory import complete_steps, step_folder
from modular_lm.train.run import open_run, resolve_config
from modular_lm.train.saving import save_model
from modular_lm.train.trainer import Callbacks, Trainer

G, T = 4, 32
TOKENIZER = build_tokenizer(TokenizerConfig())
READING = ("avg", "sum", "stack")
BASE = (
    f"steps=4 seed=3 data.seq_len={T} data.batch_size={G} optim.lr=1e-2 optim.warmup=0 "
    "model.dim=16 model.n_layers=2 model.n_heads=2 model.multiple_of=16 model.module_agg_dim=8 "
    "distributed.model_dtype=fp32 logging.freq=1 logging.mlflow.enabled=false"
)
DENSE = ("model.module_agg=drop",)


def given_config(*args: str) -> TrainConfig:
    return load_config(TrainConfig, [*BASE.split(), *args])[0]


def config(*args: str) -> TrainConfig:
    return resolve(given_config(*args), TOKENIZER.n_words)


def plain(c: TrainConfig, seed: int = 0, *, reading: bool = False) -> LanguageModel:
    model = LanguageModel(c.model)
    init_weights(model, seed)
    for name, parameter in model.named_parameters():
        if reading and name.startswith("aggs.") and name.endswith("wo.weight"):
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(seed))
    return model.eval()


def saved(folder: Path, *args: str, seed: int = 0, reading: bool = False) -> LanguageModel:
    """A model, which then also lies in `folder`."""
    c = config(*args)
    model = plain(c, seed, reading=reading)
    save_model(folder, model, c, TOKENIZER)
    return model


def tokens(length: int = T) -> torch.Tensor:
    return torch.randint(64, (2, length), generator=torch.Generator().manual_seed(1))


def logits(model: torch.nn.Module, length: int = T) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens(length))


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    yield init_world()
    dist.destroy_process_group()


# ------------------------------------------------------------------ a model alone


def test_a_saved_model_loads_for_inference(tmp_path: Path) -> None:
    model = saved(tmp_path / "new" / "m", *DENSE)
    found, tokenizer, c, folder = load_for_inference(str(tmp_path / "new" / "m"))
    assert torch.equal(logits(found), logits(model))
    assert tokenizer.content_hash == TOKENIZER.content_hash
    assert c.model == config(*DENSE).model
    names = {p.name for p in folder.iterdir()}
    assert names == {".metadata", "__0_0.distcp", "params.json", "COMPLETE"}
    listing = json.loads((folder / "COMPLETE").read_text())["files"]
    assert listing.keys() == names - {"COMPLETE"}
    assert [p.name for p in folder.parent.iterdir()] == ["m"], "nothing is left beside it"
    wanted = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert stored_shapes(folder) == wanted


def test_the_tokenizer_travels_with_the_model(tmp_path: Path, shared_data: Path) -> None:
    path = str(shared_data / "golden" / "stories260K" / "tok512.model")
    tokenizer = build_tokenizer(TokenizerConfig("sp", path))
    c = resolve(
        given_config("data.tokenizer.name=sp", f"data.tokenizer.path={path}"), tokenizer.n_words
    )
    save_model(tmp_path / "here", plain(c), c, tokenizer)
    shutil.move(tmp_path / "here", tmp_path / "there")
    found = load_for_inference(str(tmp_path / "there"))[1]
    assert found.file == tmp_path / "there" / "tokenizer.model"
    assert found.content_hash == tokenizer.content_hash


def test_a_save_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(RunFailedError, match=r"/m: No space left on device; free some space"):
        saved(tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------ loading it


@pytest.mark.parametrize("sharded", [False, True])
def test_the_weights_of_any_checkpoint_load_into_plain_and_sharded_models(
    world: World, tmp_path: Path, sharded: bool
) -> None:
    args = ("model.module_seq_len=8", "model.module_agg=stack")
    model = saved(tmp_path / "m", *args, reading=True)
    c = config(*args, "seed=9")
    other = build_model(c, world) if sharded else plain(c, 9)
    load_model(tmp_path / "m", other, world)
    assert torch.equal(logits(other), logits(model))


@pytest.mark.parametrize("agg", ["drop", *READING])
def test_a_dense_checkpoint_becomes_modular(world: World, tmp_path: Path, agg: str) -> None:
    dense = saved(tmp_path / "m", *DENSE)
    results = []
    for length in (T, 2 * T, 8):
        keys = (f"model.module_agg={agg}", f"model.module_seq_len={length}")
        model = plain(config(*keys), seed=7)
        load_model(tmp_path / "m", model, world)
        results.append(logits(model))
    assert torch.equal(results[0], logits(dense))
    assert torch.equal(results[1], logits(dense))
    dropping = LanguageModel(config("model.module_agg=drop", "model.module_seq_len=8").model)
    dropping.load_state_dict(dense.state_dict())
    assert torch.equal(results[2], logits(dropping))
    assert not torch.equal(results[2], logits(dense))


def test_stories260k_becomes_modular(world: World, tmp_path: Path, shared_data: Path) -> None:
    folder = shared_data / "golden" / "stories260K"
    given = torch.from_numpy(np.load(folder / "golden_logits.npz")["tokens"])[None]
    length = given.shape[1]
    m, seq_len, state = read_hf(folder / "hf")
    dense = LanguageModel(m)
    dense.load_state_dict(state)
    save_model(tmp_path / "m", dense, TrainConfig(model=m), TOKENIZER)

    def modular(agg: Any, chunk: int) -> torch.Tensor:
        keys = dataclasses.replace(m, module_agg=agg, module_seq_len=chunk, module_sum_scale=None)
        model = LanguageModel(resolve_model(keys, seq_len, m.vocab_size))
        init_weights(model, 5)
        load_model(tmp_path / "m", model, world)
        with torch.no_grad():
            return model(given)

    with torch.no_grad():
        expected = dense(given)
    for agg in ("drop", *READING):
        assert torch.equal(modular(agg, length), expected)
        assert torch.equal(modular(agg, 16), modular("drop", 16))


def test_sites_that_are_new_keep_their_seeded_start(world: World, tmp_path: Path) -> None:
    saved(tmp_path / "m", *DENSE)
    c = config("model.module_seq_len=8", "model.module_agg=stack")
    model = plain(c, seed=7)
    new = load_model(tmp_path / "m", model, world)
    fresh = plain(c, seed=7).state_dict()
    sites = [name for name in fresh if name.startswith("aggs.")]
    assert new == set(sites) != set()
    assert all(torch.equal(model.state_dict()[name], fresh[name]) for name in sites)


def test_sites_that_never_ran_count_as_absent(world: World, tmp_path: Path) -> None:
    """The default config is a dense model with idle `avg` sites: it must become any other."""
    dense = saved(tmp_path / "m", "model.module_agg=avg")
    model = plain(config("model.module_agg=stack", f"model.module_seq_len={T}"), seed=7)
    load_model(tmp_path / "m", model, world)
    assert torch.equal(logits(model), logits(dense))


def test_columns_may_be_new_but_not_lost(world: World, tmp_path: Path) -> None:
    dense = saved(tmp_path / "m", *DENSE)
    grown = config(*DENSE, "model.module_names=code", "checkpoint.init_ckpt_path=somewhere")
    model, fresh = plain(grown, 7), plain(grown, 7).state_dict()
    new = load_model(tmp_path / "m", model, world)
    assert new == {name for name in fresh if name.startswith("columns.code.")} != set()
    for name, tensor in model.state_dict().items():
        expected = fresh if name in new else dense.state_dict()
        assert torch.equal(tensor, expected[name])
    save_model(tmp_path / "grown", model, grown, TOKENIZER)
    lost = r"tensor columns\.code\.\S+ has no place here; name the column code in model\.module_n"
    with pytest.raises(AgreedError, match=lost):
        load_model(tmp_path / "grown", plain(config(*DENSE)), world)
    assert load_model(tmp_path / "grown", model, world) == set()


@pytest.mark.parametrize(
    ("theirs", "ours", "message"),
    [
        ("stack", "drop", r"tensor aggs\.0\.\S+ has no place here; set model\.module_agg=stack"),
        ("avg", "stack", r"tensor aggs\.0\.wo\.weight has the shape \[16, 16\] there, \[16, 8\]"),
        ("drop model.dim=32", "drop", r"has the shape .*32.* set the keys of model\.\* as in"),
        ("drop model.n_layers=1", "drop", r"tensor layers\.1\.\S+ is missing there"),
        ("drop model.n_layers=3", "drop", r"tensor layers\.2\.\S+ has no place here"),
        ("drop model.weight_tying=true", "drop", r"tensor output\.weight is missing there"),
        ("avg", "avg model.n_layers=3", r"is missing there"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(
    world: World, tmp_path: Path, theirs: str, ours: str, message: str
) -> None:
    chunks = "model.module_seq_len=8"
    saved(tmp_path / "m", chunks, *f"model.module_agg={theirs}".split())
    model = plain(config(chunks, *f"model.module_agg={ours}".split()))
    with pytest.raises(AgreedError, match=message) as caught:
        load_model(tmp_path / "m", model, world)
    assert caught.value.exit_code == 2
    assert str(caught.value).startswith(f"the weights of {tmp_path / 'm'} cannot be used")


def test_sites_are_taken_all_or_none(world: World, tmp_path: Path) -> None:
    keys = ("model.module_seq_len=8", "model.n_layers=4", "model.module_agg=avg")
    saved(tmp_path / "m", *keys, "model.module_n_layers=2")
    model = plain(config(*keys, "model.module_n_layers=1"))
    with pytest.raises(AgreedError, match=r"tensor aggs\.1\.\S+ is missing.*module_n_layers=2"):
        load_model(tmp_path / "m", model, world)


def test_a_damaged_checkpoint_is_refused_with_the_file(world: World, tmp_path: Path) -> None:
    saved(tmp_path / "m", *DENSE)
    victim = tmp_path / "m" / "__0_0.distcp"
    victim.write_bytes(victim.read_bytes()[:-1])
    with pytest.raises(AgreedError, match=r"__0_0\.distcp.*truncated"):
        load_model(tmp_path / "m", plain(config(*DENSE)), world)


# ------------------------------------------------------------------ a run that starts from it


def rows(start: int = 0) -> Iterator[StepRows]:
    for step in range(start, 4):
        drawn = np.random.default_rng(step).integers(0, 64, (G, T + 1), dtype=np.uint16)
        yield StepRows(step, np.arange(step * G, (step + 1) * G), drawn)


def trainer(world: World, folder: Path, lines: list[dict[str, Any]], *args: str) -> Trainer:
    def nothing(line: dict[str, Any]) -> None:
        return None

    callbacks = Callbacks(
        lines.append, nothing, nothing, lambda: None, lambda _: None, lambda *_: None
    )
    return Trainer(config(*args), world, RunFolder(folder), TOKENIZER, G, callbacks)


def test_training_starts_at_the_loss_of_the_loaded_weights(world: World, tmp_path: Path) -> None:
    first: list[dict[str, Any]] = []
    t = trainer(world, tmp_path / "first", first, *DENSE)
    t.resume(0)
    t.run(rows(), 4)
    source = step_folder(tmp_path / "first" / "checkpoints", 4)
    model = load_for_inference(str(source))[0]
    drawn = torch.from_numpy(next(rows()).tokens.astype(np.int64))
    with torch.no_grad():
        expected = model(drawn[:, :-1], drawn[:, 1:]).mean().item()

    lines: list[dict[str, Any]] = []
    keys = ("model.module_agg=stack", f"checkpoint.init_ckpt_path={source}")
    second = trainer(world, tmp_path / "second", lines, *keys)
    second.resume(0)
    assert not second.optimizers.parts[0].state, "only the model is loaded"
    second.run(rows(), 2)
    assert lines[0]["loss/out"] == pytest.approx(expected, rel=1e-6)
    assert lines[0]["loss/out"] < first[0]["loss/out"] - 0.1
    assert complete_steps(tmp_path / "second" / "checkpoints") == [2]

    shutil.rmtree(tmp_path / "first")
    third = trainer(world, tmp_path / "second", lines, *keys)
    third.resume(2)
    assert third.step == 2


@pytest.fixture
def builtin(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODULAR_LM_CACHE", str(cache))


def run_config(tmp_path: Path, *args: str) -> TrainConfig:
    return given_config(
        f"checkpoint.init_ckpt_path={tmp_path / 'm'}", f"dump_dir={tmp_path / 'run'}", *args
    )


def test_the_run_records_what_it_started_from(tmp_path: Path, builtin: None) -> None:
    runs = tmp_path / "m" / "checkpoints"
    saved(runs / "0000000003", *DENSE)
    saved(runs / "0000000007", *DENSE)
    run = open_run(*resolve_config(run_config(tmp_path)), 1)
    run.begin({})
    assert run.begin_attempt(["here"]) == 0
    path = str(runs / "0000000007")
    assert run.config.checkpoint.init_ckpt_path == path, "a run stands for its latest"
    for kind in ("created", "attempt"):
        event = run.folder.last_event(kind)
        assert event is not None
        assert event["init_ckpt_path"] == path
    other = run_config(tmp_path, f"checkpoint.init_ckpt_path={runs / '0000000003'}")
    assert open_run(*resolve_config(run_config(tmp_path)), 1).is_new is False
    assert open_run(*resolve_config(other), 1).is_new, "nothing was saved: it begins anew"


def test_once_a_run_has_a_checkpoint_its_start_may_be_gone(tmp_path: Path, builtin: None) -> None:
    saved(tmp_path / "m", *DENSE)
    run = open_run(*resolve_config(run_config(tmp_path)), 1)
    run.begin({})
    shutil.copytree(tmp_path / "m", step_folder(run.folder.checkpoints, 2))
    shutil.rmtree(tmp_path / "m")
    again = open_run(*resolve_config(run_config(tmp_path)), 1)
    assert again.begin_attempt(["here"]) == 2
    event = again.folder.last_event("attempt")
    assert event is not None
    assert (event["init_ckpt_path"], event["config_changes"]) == (None, [])


def test_another_start_is_an_allowed_change() -> None:
    refused, allowed = changes(config(), config("checkpoint.init_ckpt_path=x"))
    assert (refused, allowed) == ([], ["checkpoint.init_ckpt_path: None -> x"])


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("model.dim=32", "model.dim: 16 there, 32 here; model.head_dim: 8 there, 16 here"),
        ("model.n_layers=3", "model.n_layers: 2 there, 3 here"),
        ("model.n_kv_heads=1", "model.n_kv_heads: 2 there, 1 here"),
        ("model.vocab_size=300", "model.vocab_size: 258 there, 300 here"),
        ("model.weight_tying=true", "model.weight_tying: False there, True here"),
        ("model.rope_theta=5e5", "model.rope_theta: 10000.0 there, 500000.0 here"),
        ("model.norm_eps=1e-6", "model.norm_eps: 1e-05 there, 1e-06 here"),
        ("model.multiple_of=32", "(feed-forward width): 48 there, 64 here"),
        ("model.module_agg=stack", "model.module_agg: avg there, stack here"),
        ("model.module_agg=drop", "model.module_agg: avg there, drop here"),
    ],
)
def test_a_model_that_does_not_fit_is_refused_before_anything_starts(
    tmp_path: Path, args: str, message: str
) -> None:
    saved(tmp_path / "m", "model.module_seq_len=8", "model.module_agg=avg")
    with pytest.raises(ConfigError) as caught:
        resolve_config(run_config(tmp_path, *args.split()))
    assert str(caught.value).startswith(f"checkpoint.init_ckpt_path={tmp_path / 'm'}: ")
    assert message in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_another_tokenizer_is_refused(tmp_path: Path, shared_data: Path) -> None:
    saved(tmp_path / "m", *DENSE, "model.vocab_size=512")
    path = shared_data / "golden" / "stories260K" / "tok512.model"
    args = ("data.tokenizer.name=sp", f"data.tokenizer.path={path}", "model.vocab_size=512")
    with pytest.raises(ConfigError, match=r"its tokenizer \(bytes \w+\) is not this run's \(sp"):
        resolve_config(run_config(tmp_path, *args))


def test_a_start_that_is_not_there_or_not_whole_is_refused(tmp_path: Path) -> None:
    key = f"checkpoint.init_ckpt_path={tmp_path / 'm'}"
    with pytest.raises(CheckpointError, match=f"^{key}: no such folder"):
        resolve_config(run_config(tmp_path))
    saved(tmp_path / "m", *DENSE)
    (tmp_path / "m" / "COMPLETE").unlink()
    with pytest.raises(CheckpointError, match=f"^{key}: has no COMPLETE file"):
        resolve_config(run_config(tmp_path))


def test_a_key_of_the_model_that_is_no_part_of_the_trunk_may_differ(tmp_path: Path) -> None:
    saved(tmp_path / "m", *DENSE)
    keys = ("model.module_agg=stack", "model.module_seq_len=8", "model.module_n_layers=1")
    resolved, _ = resolve_config(run_config(tmp_path, *keys))
    assert resolved.checkpoint.init_ckpt_path == str(tmp_path / "m")
    assert isinstance(resolved.model, ModelConfig)
