"""`dry_run=true` on every config of the repository, by way of the training job's own main."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
import yaml

from modular_lm.cli import run_job
from modular_lm.config import SweepConfig, TrainConfig, load_config
from modular_lm.config.checks import resolve, world_sizes
from modular_lm.config.schema import PrepareConfig, TokenizerConfig
from modular_lm.data.prepare import prepare_sources
from modular_lm.errors import ConfigError
from modular_lm.model.columns import freeze
from modular_lm.model.flops import flops_per_token
from modular_lm.model.lm import LanguageModel
from modular_lm.model.memory import Memory, memory_estimate
from modular_lm.optim import build_optimizers
from modular_lm.sweep.trials import plan_sweep
from modular_lm.train.dry_run import describe
from ray_jobs import sweep, train
from tests.support import REPO

SWEEPS, RUNS = [], []
for _file in sorted((REPO / "configs").glob("*.yaml")):
    (SWEEPS if "sweep" in yaml.safe_load(_file.read_text()) else RUNS).append(_file)
# As the comment at their top says, these need prepared data and a tokenizer.
NEEDS_DATA = {"mini.yaml", "ablation.yaml"}


@pytest.fixture(scope="module")
def data(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The arguments that name prepared data and a tokenizer, for the configs that need them."""
    folder = tmp_path_factory.mktemp("data")
    tokenizer = shared_data / "tokenizers" / "llama2" / "tokenizer.model"
    for source in ("books", "gov", "web", "wiki"):
        (folder / "text" / source).mkdir(parents=True)
        texts = [f"{source}, document {i}: {'some words ' * 150}" for i in range(20)]
        lines = "\n".join(json.dumps({"text": text}) for text in texts)
        (folder / "text" / source / "part.jsonl").write_text(lines)
    made_by = TokenizerConfig(name="sp", path=str(tokenizer))
    job = PrepareConfig(src=str(folder / "text"), dst=str(folder / "out"), tokenizer=made_by)
    prepare_sources(job)
    return [f"data.root_dir={folder / 'out'}", f"data.tokenizer.path={tokenizer}"]


@pytest.fixture
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder, with the cache in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MODULAR_LM_CACHE", str(tmp_path / "cache"))
    return tmp_path


def figures(output: str) -> dict[str, str]:
    """The lines `name   value` below the YAML."""
    return dict(re.findall(r"^([a-zA-Z][a-zA-Z ]*?) {2,}(.+)$", output, flags=re.MULTILINE))


def number(text: str) -> int:
    return int(text.split()[0].replace(",", ""))


def check_dry_run(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        run_job(
            TrainConfig,
            train.main,
            what="",
            usage="",
            args=[*arguments, "dry_run=true"],
        )
    output = capsys.readouterr().out
    assert caught.value.code == 0
    given, _ = load_config(TrainConfig, arguments)
    printed = yaml.safe_load(output[: output.index("\nparameters ")])
    resolved = resolve(given, printed["model"]["vocab_size"])
    with torch.device("meta"):
        model = LanguageModel(resolved.model)
    total = sum(p.numel() for p in model.parameters())
    rows, workers = figures(output), world_sizes(given.ray)[1]
    batch = given.data.batch_size * given.grad_acc_steps * workers
    per_step = batch * given.data.seq_len
    stop = given.stop_at or given.steps
    assert number(rows["parameters"]) == total
    without = total - model.tok_embeddings.weight.numel()
    assert f"({without:,} without embeddings)" in rows["parameters"]
    assert number(rows["workers"]) == workers
    assert number(rows["samples per step"]) == batch
    assert number(rows["tokens per step"]) == per_step
    assert number(rows["steps"]) == stop
    assert number(rows["tokens in all"]) == stop * per_step
    per_token = flops_per_token(resolved.model, given.data.seq_len)
    assert float(rows["FLOPs per token"].split()[0]) == pytest.approx(per_token, rel=1e-3)
    state = f"{16 * total / workers / 2**20:,.0f} weights, gradients and optimizer"
    assert state in rows["memory per worker"]


@pytest.mark.parametrize("file", RUNS, ids=lambda file: file.name)
def test_every_config_passes_and_says_what_it_costs_and_writes_nothing(
    file: Path,
    empty: Path,
    capsys: pytest.CaptureFixture[str],
    request: pytest.FixtureRequest,
) -> None:
    extra = request.getfixturevalue("data") if file.name in NEEDS_DATA else []
    check_dry_run([f"config={file}", *extra], capsys)
    assert list(empty.iterdir()) == []


@pytest.mark.parametrize("file", SWEEPS, ids=lambda file: file.name)
def test_every_sweep_passes_and_lists_its_trials_and_writes_nothing(
    file: Path,
    empty: Path,
    capsys: pytest.CaptureFixture[str],
    request: pytest.FixtureRequest,
) -> None:
    extra = request.getfixturevalue("data") if file.name in NEEDS_DATA else []
    arguments = [f"config={file}", *extra]
    with pytest.raises(SystemExit) as caught:
        run_job(SweepConfig, sweep.main, what="", usage="", args=[*arguments, "dry_run=true"])
    assert caught.value.code == 0
    plan = plan_sweep(*load_config(SweepConfig, arguments))
    output = capsys.readouterr().out
    assert number(figures(output)["trials"]) == len(plan.trials)
    for arm in plan.arms:
        assert arm.cost is not None, arm.why
        assert re.search(
            rf"^{re.escape(arm.name)} +{arm.steps:,} .* {arm.cost.parameters:,} ", output, re.M
        )
    assert list(empty.iterdir()) == []


def test_stop_at_accumulation_and_workers_are_counted(
    empty: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = ["steps=50", "stop_at=20", "grad_acc_steps=3", "ray.num_workers=5"]
    check_dry_run([f"config={REPO / 'configs' / 'debug.yaml'}", *keys], capsys)


def test_a_mistake_is_answered_before_anything_is_printed(
    empty: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        run_job(TrainConfig, train.main, what="", usage="", args=["model.dim=100", "dry_run=true"])
    assert caught.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: model.dim=100: must be divisible by model.n_heads=8")
    assert list(empty.iterdir()) == []


def tiny(*args: str) -> TrainConfig:
    base = ["model.dim=32", "model.n_layers=2", "model.n_heads=2", "model.multiple_of=16"]
    return resolve(load_config(TrainConfig, [*base, "data.seq_len=64", *args])[0], 258)


def test_warnings_stand_below_the_figures() -> None:
    dense, modular = tiny("model.module_seq_len=64"), tiny("model.module_seq_len=16")
    assert describe(dense, 1).splitlines()[-1].startswith("warning: model.module_agg=avg cannot")
    assert "warning" not in describe(modular, 1)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("mode", ["drop", "avg", "stack"])
def test_state_memory_is_that_of_weights_gradients_and_moments(mode: str, optimizer: str) -> None:
    keys = ("model.module_seq_len=16", f"model.module_agg={mode}", f"optim.name={optimizer}")
    config = tiny(*keys)
    model = LanguageModel(config.model)
    torch.nn.init.normal_(model.tok_embeddings.weight)
    optimizers = build_optimizers(model, config.optim)
    optimizers.set_learning_rate(1e-3)
    tokens = torch.zeros(1, 64, dtype=torch.int64)
    model(tokens, tokens).sum().backward()
    optimizers.step()
    moments = [t for part in optimizers.parts for s in part.state.values() for t in s.values()]
    tensors = [*model.parameters(), *(p.grad for p in model.parameters()), *moments]
    held = sum(t.nbytes for t in tensors if t is not None and t.ndim)  # without step counters
    alone, shared = memory_estimate(config, 1), memory_estimate(config, 4)
    assert alone.state == held
    # Sharded evenly over the workers; a worker's activations are its own.
    assert (shared.state, shared.activations) == (held / 4, alone.activations)


@pytest.mark.parametrize(
    ("more", "learning"),
    [
        (("model.module_train=new",), "code"),
        (("model.module_train=all",), "code and what all share"),
    ],
)
def test_columns_are_shown_and_those_that_do_not_learn_cost_only_their_weights(
    more: tuple[str, ...], learning: str
) -> None:
    keys = ("model.module_seq_len=16", "model.module_agg=avg")
    columns = ("model.module_names=law,code", "model.module_route=code")
    config = tiny(*keys, *columns, "checkpoint.init_ckpt_path=somewhere", *more)
    model = LanguageModel(config.model)
    freeze(model, config.model)
    total = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    rows = figures(describe(config, 1))
    assert number(rows["parameters"]) == total
    assert rows["columns"] == "base, law, code"
    assert rows["learning"] == f"{learning}, {trained:,} parameters"
    need = memory_estimate(config, 1)
    assert need.state == 4 * total + 12 * trained
    dense = memory_estimate(tiny(*keys), 1)
    assert need.activations == dense.activations, "one column runs at a time"
    assert "columns" not in figures(describe(tiny(*keys), 1))


def test_activations_grow_with_the_micro_batch_and_shrink_with_bf16() -> None:
    def activations(*args: str) -> float:
        return memory_estimate(tiny("model.module_seq_len=16", *args), 1).activations

    one = activations("data.batch_size=1")
    assert activations("data.batch_size=6") == pytest.approx(6 * one)
    assert activations("data.batch_size=1", "grad_acc_steps=6") == one
    full = activations("data.batch_size=1", "distributed.model_dtype=fp32")
    assert one < full < 2 * one  # the logits stay fp32


def test_memory_follows_from_how_the_model_is_spread() -> None:
    def need(world_size: int, *args: str) -> Memory:
        keys = [f"distributed.{arg}" for arg in args]
        return memory_estimate(tiny("model.module_seq_len=16", *keys), world_size)

    one = need(1)
    assert need(8).state == one.state / 8
    assert need(8, "dp_shard=2").state == one.state / 2
    assert need(8, "fsdp_type=no_shard").state == one.state
    assert need(8, "fsdp_type=no_shard", "tp_size=2").state == one.state / 2
    assert need(8, "tp_size=2").state == one.state / 8
    whole = need(8, "fsdp_type=shard_grad_op").copies
    assert need(8, "fsdp_type=no_shard").copies == whole > need(8, "tp_size=2").copies
    assert need(1, "model_dtype=fp32").copies == 0
    deep = ("model.module_seq_len=16", "model.n_layers=12")
    none, selective, full = (
        memory_estimate(tiny(*deep, f"distributed.activation_checkpointing={mode}"), 1)
        for mode in ("none", "selective", "full")
    )
    assert none.activations > selective.activations > full.activations
    assert one.activations / 2 < need(2, "tp_size=2").activations < one.activations


def test_workers_are_counted_by_what_they_share() -> None:
    config = tiny("model.module_seq_len=16", "distributed.tp_size=2", "distributed.dp_shard=2")
    rows = figures(describe(config, 8))
    assert rows["workers"] == "8 (2 replicas x 2 shards x 2 tensor parallel)"
    assert number(rows["samples per step"]) == 4 * config.data.batch_size
    with pytest.raises(ConfigError, match=r"tp_size=2.*cannot be made of 7 workers"):
        describe(config, 7)
