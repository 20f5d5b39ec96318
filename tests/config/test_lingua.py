"""A Meta Lingua YAML loads; what cannot be honoured is refused, what does not matter warned of."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from modular_lm.config import TrainConfig, load_config
from modular_lm.errors import ConfigError

# The keys of Lingua's own debug configuration, with other values.
LINGUA = """
dump_dir: /tmp/dump
name: debug
steps: 1000
probe_freq: null
seed: 777
optim: {lr: 3e-4, weight_decay: 0.033, warmup: 500, lr_min_ratio: 0.000001, clip: 1.0}
distributed:
  fsdp_type: full_shard
  compile: false
  model_dtype: bf16
  matmul_allow_tf32: false
  selective_activation_checkpointing: false
  tp_size: 1
model: {dim: 1024, n_layers: 8, n_heads: 8}
data:
  root_dir: data/shuffled
  sources: {fineweb_edu_10bt_shuffled: 100.0}
  batch_size: 32
  prefetch_size: 1024
  seq_len: 1024
  n_views: 2
  load_async: true
  add_bos: true
  add_eos: true
  tokenizer: {name: tiktoken, path: tokenizers/llama3.model}
profiling: {run: true}
checkpoint:
  dump: {every: 100, keep: 1}
  eval: {every: 100, keep: 1}
logging: {freq: 10}
eval:
  harness: {tasks: [hellaswag]}
  generator: {max_tokens: 4096}
  validation: {max_steps: 100}
"""


def write(folder: Path, text: str) -> str:
    file = folder / "lingua.yaml"
    file.write_text(text)
    return f"config={file}"


def test_a_lingua_config_loads(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        config, _ = load_config(TrainConfig, [write(tmp_path, LINGUA)])
    assert (config.model.dim, config.data.tokenizer.name, config.checkpoint.dump.every) == (
        1024,
        "tiktoken",
        100,
    )
    for ignored in ("data.load_async", "data.n_views", "data.prefetch_size", "profiling"):
        assert f"{ignored} is ignored" in caplog.text


def test_the_table_holds_for_the_command_line_too(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        load_config(TrainConfig, ["data.prefetch_size=4", "data.tokenizer.path=unused"])
    assert "data.prefetch_size is ignored" in caplog.text
    assert "data.tokenizer.path is ignored" in caplog.text


@pytest.mark.parametrize(
    ("part", "key"),
    [
        (
            "checkpoint: {continue_training_from_init: true}",
            "checkpoint.continue_training_from_init=True",
        ),
        ("model: {n_future_head: 4}", "model.n_future_head=4"),
        ("optim: {cosine_theta: 3.0}", "optim.cosine_theta=3.0"),
        ("data: {add_bos: false}", "data.add_bos=False"),
    ],
)
def test_what_would_train_something_else_is_refused(tmp_path: Path, part: str, key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(TrainConfig, [write(tmp_path, part)])
    assert str(caught.value).startswith(key)


def test_weights_to_start_from_are_taken_over(tmp_path: Path) -> None:
    part = "checkpoint: {init_ckpt_path: /x, continue_training_from_init: false}"
    config, _ = load_config(TrainConfig, [write(tmp_path, part)])
    assert config.checkpoint.init_ckpt_path == "/x"


def test_schedules_are_taken_over(tmp_path: Path) -> None:
    part = "optim: {scheduler: wsd, decay_fraction: 0.2, annealing_step: 1000, cosine_theta: 1.0}"
    optim = load_config(TrainConfig, [write(tmp_path, part)])[0].optim
    assert (optim.scheduler, optim.decay_fraction) == ("wsd", 0.2)
    part = "optim: {scheduler: inv_sqrt, exp_factor: 0.7}"
    optim = load_config(TrainConfig, [write(tmp_path, part)])[0].optim
    assert (optim.scheduler, optim.exp_factor) == ("inv_sqrt", 0.7)


def test_checkpoints_go_where_lingua_would_put_them() -> None:
    config = load_config(TrainConfig, ["checkpoint.path=/x/checkpoints"])[0]
    assert config.checkpoint.path == "/x/checkpoints"
    assert load_config(TrainConfig, ["checkpoint.path=null"])[0].checkpoint.path is None
