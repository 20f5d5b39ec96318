"""Runs that start from weights in another format than a checkpoint's, on any mesh."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from torch.distributed.tensor import DTensor

from modular_lm.config import ConvertConfig, TrainConfig, load_config
from modular_lm.config.checks import resolve
from modular_lm.errors import AgreedError, CheckpointError, ConfigError
from modular_lm.model.init import init_weights
from modular_lm.model.lm import LanguageModel
from modular_lm.parallel import build_model, init_world
from modular_lm.train.initial import load_initial
from modular_lm.train.run import resolve_config
from modular_lm.train.saved_config import initial_format
from modular_lm.train.saving import save_model
from ray_jobs.convert import main
from tests.pool import Pool
from tests.train.ranks_worker import TOKENIZER, digest

BASE = (
    "data.seq_len=16 model.dim=16 model.n_layers=2 model.n_heads=4 model.n_kv_heads=4 "
    "model.multiple_of=16 model.module_agg=drop distributed.model_dtype=fp32"
)
MODULAR = "model.module_agg=avg model.module_seq_len=4"


def given(*args: str) -> TrainConfig:
    return load_config(TrainConfig, [*BASE.split(), *args])[0]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One dense model in every format; rope_theta says that it is no default."""
    folder = tmp_path_factory.mktemp("sources")
    c = resolve(given("model.rope_theta=5e4"), TOKENIZER.n_words)
    model = LanguageModel(c.model)
    init_weights(model, 9)
    save_model(folder / "dcp", model, c, TOKENIZER)
    found = {"dcp": folder / "dcp"}
    for kind, name in (("hf", "hf"), ("torch", "m.pth"), ("safetensors", "plain")):
        found[kind] = folder / name
        arguments = ["from=dcp", f"to={kind}", f"src={folder / 'dcp'}", f"dst={found[kind]}"]
        main(*load_config(ConvertConfig, arguments))
    found["meta"] = folder / "meta"
    found["meta"].mkdir()
    torch.save({"model": model.state_dict()}, found["meta"] / "consolidated.pth")
    shutil.copy(folder / "hf" / "config.json", folder / "meta" / "unrelated.json")
    (found["meta"] / "params.json").write_text(
        '{"model": {"dim": 16, "n_layers": 2, "n_heads": 4, "rope_theta": 50000.0}}'
    )
    return found


def digests(source: str, keys: str) -> dict[str, str]:
    """Of a model that starts from `source`, as the ranks of a mesh spread it."""
    config = resolve(given("model.rope_theta=5e4", *keys.split()), TOKENIZER.n_words)
    world = init_world(config.distributed, use_gpu=False)
    model = build_model(config, world)
    load_initial(source, model, config.data.tokenizer, world)
    assert world.size == 1 or any(isinstance(p, DTensor) for p in model.parameters())
    return {name: digest(p) for name, p in model.named_parameters()}


def refusal(source: str, keys: str) -> tuple[str, int]:
    try:
        digests(source, keys)
    except AgreedError as error:
        return str(error), error.exit_code
    return "", 0


@pytest.mark.parametrize("kind", ["hf", "torch", "safetensors", "meta"])
def test_every_format_is_told_from_the_others(sources: dict[str, Path], kind: str) -> None:
    assert initial_format(str(sources[kind])) == kind
    assert initial_format(str(sources["meta"] / "consolidated.pth")) == "meta"
    assert initial_format(str(sources["dcp"])) == "dcp"
    assert initial_format("s3://bucket/run") == "dcp"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["hf", "torch", "safetensors", "meta"])
def test_a_run_starts_from_it_on_every_mesh(
    sources: dict[str, Path], kind: str, pool: Pool
) -> None:
    (expected,) = pool.run(1, digests, str(sources["dcp"]), "")
    for ranks, keys in ((1, ""), (2, ""), (4, "distributed.tp_size=2")):
        for found in pool.run(ranks, digests, str(sources[kind]), keys):
            assert found == expected


@pytest.mark.slow
def test_a_dense_one_becomes_modular(sources: dict[str, Path], pool: Pool) -> None:
    (expected,) = pool.run(1, digests, str(sources["dcp"]), MODULAR)
    assert any(name.startswith("aggs.") for name in expected)
    for found in pool.run(2, digests, str(sources["hf"]), MODULAR):
        assert found == expected


@pytest.mark.slow
def test_what_rank_0_cannot_read_all_ranks_refuse(
    sources: dict[str, Path], pool: Pool, tmp_path: Path
) -> None:
    shutil.copytree(sources["hf"], tmp_path / "hf")
    (tmp_path / "hf" / "model.safetensors").write_bytes(b"short")
    for message, code in pool.run(2, refusal, str(tmp_path / "hf"), ""):
        assert "model.safetensors: not readable as safetensors" in message
        assert code == 2
    for message, _ in pool.run(2, refusal, str(sources["hf"]), "model.n_layers=3"):
        assert "tensor layers.2." in message


@pytest.mark.parametrize("kind", ["hf", "torch", "safetensors", "meta"])
def test_another_model_is_refused_before_anything_starts(
    sources: dict[str, Path], kind: str, tmp_path: Path
) -> None:
    keys = (f"checkpoint.init_ckpt_path={sources[kind]}", f"dump_dir={tmp_path / 'run'}")
    resolved, _ = resolve_config(given("model.rope_theta=5e4", *keys))
    assert resolved.checkpoint.init_ckpt_path == str(sources[kind])
    with pytest.raises(ConfigError, match=r"model\.rope_theta: 50000\.0 there, 10000\.0 here"):
        resolve_config(given(*keys))
    with pytest.raises(ConfigError, match=r"model\.dim: 16 there, 32 here"):
        resolve_config(given("model.dim=32", "model.rope_theta=5e4", *keys))
    assert not (tmp_path / "run").exists()


def test_files_that_are_no_weights_are_named(tmp_path: Path) -> None:
    file = tmp_path / "x.pth"
    file.write_bytes(b"nonsense")
    with pytest.raises(CheckpointError, match=r"x\.pth: not readable as a torch file"):
        resolve_config(given(f"checkpoint.init_ckpt_path={file}", f"dump_dir={tmp_path / 'run'}"))
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(CheckpointError, match=r'model_type="gpt2": not a plain Llama'):
        resolve_config(given(f"checkpoint.init_ckpt_path={tmp_path}", f"dump_dir={tmp_path / 'r'}"))
