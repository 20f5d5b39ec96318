"""Converting a model between this project's checkpoints and other formats, in one process.

`READERS` and `WRITERS` know the formats; between them is a `Model`: parameters by our names in
fp32, the config and the tokenizer. The formats:

    dcp    a checkpoint folder of this project; written without optimizer (`checkpoint.save_model`)
    torch  one file for torch.load(weights_only=True): {"format": "modular_lm", "model": {name:
           tensor}, "config": the content of params.json, "tokenizer": bytes of its file or None}
    hf     a folder of Hugging Face's Llama (`modular_lm.model.hf`)
    meta   a folder (or its .pth) of Meta's or Lingua's Llama (`modular_lm.model.meta`); only read
    safetensors  a folder with model.safetensors, parameters by our names, and params.json, in which
           our config stands; for any model, also a modular one

The whole model is in memory, in fp32.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modular_lm.config import DataConfig, ModelConfig, TokenizerConfig, TrainConfig
from modular_lm.config.checks import has_one_chunk
from modular_lm.config.load import from_dict
from modular_lm.errors import CheckpointError, ConfigError
from modular_lm.files import new_folder, replacing, writing
from modular_lm.model.foreign import read_json, take_own
from modular_lm.model.hf import (
    CONFIG,
    WEIGHTS,
    config_from_hf,
    config_to_hf,
    read_hf,
    read_safetensors,
    state_to_hf,
    write_hf,
    write_safetensors,
)
from modular_lm.model.lm import LanguageModel
from modular_lm.model.meta import load_pth, read_meta
from modular_lm.model.sizes import sizes_of
from modular_lm.storage import Place
from modular_lm.tokenizer import Tokenizer, build_tokenizer
from modular_lm.train.checkpoint import load_for_inference
from modular_lm.train.saved_config import TOKENIZER_FILE, read_config
from modular_lm.train.saving import portable_config, save_model, write_companions

log = logging.getLogger(__name__)

_FORMAT = "modular_lm"
_PARTS = {"model", "config", "tokenizer"}


@dataclass(frozen=True)
class Model:
    """A model between two formats; `state` holds its parameters under our names."""

    config: TrainConfig
    state: dict[str, Tensor]
    tokenizer: Tokenizer


def convert(
    source: str, target: str, src: Place, dst: Path, tokenizer: TokenizerConfig, scratch: Path
) -> Model:
    """Read `src` in the format `source` and write `dst` in the format `target`.

    tokenizer: the model's, for formats that bring none; scratch: an empty folder for what is
    needed only meanwhile. Raises CheckpointError or ConfigError for what cannot be converted,
    RunFailedError where `dst`, which must be new, cannot be written.
    """
    model = READERS[source](src, tokenizer, scratch)
    WRITERS[target](dst, model)
    return model


def read_foreign(source: str, src: Path, tokenizer: TokenizerConfig) -> Model:
    """The model at `src`; tokenizer: for formats that bring none. Raises as `convert`."""
    with tempfile.TemporaryDirectory() as scratch:
        return READERS[source](src, tokenizer, Path(scratch))


def read_foreign_config(source: str, src: Path, tokenizer: TokenizerConfig | None) -> TrainConfig:
    """The config alone, as `read_foreign` gives it; reads no tensors where that can be helped."""
    tokenizer = tokenizer or TokenizerConfig()
    if source == "hf":
        model, seq_len = config_from_hf(read_json(src / CONFIG), str(src / CONFIG))
        return _config(model, seq_len, tokenizer)
    if source == "safetensors":
        return read_config(src)
    if source == "meta":
        model, seq_len, _ = read_meta(src)
        return _config(model, seq_len, tokenizer)
    return _torch_config(src, load_pth(src))


# ------------------------------------------------------------------ reading


def _read_hf(src: Path, tokenizer: TokenizerConfig, scratch: Path) -> Model:
    return _imported(src, *read_hf(src), tokenizer)


def _read_meta(src: Path, tokenizer: TokenizerConfig, scratch: Path) -> Model:
    return _imported(src, *read_meta(src), tokenizer)


def _imported(
    src: Path,
    model: ModelConfig,
    seq_len: int,
    state: dict[str, Tensor],
    named: TokenizerConfig,
) -> Model:
    tokenizer = build_tokenizer(named, key="tokenizer")
    if tokenizer.n_words > model.vocab_size:
        raise ConfigError(
            f"tokenizer.name={tokenizer.name}: has {tokenizer.n_words} tokens, but the model of "
            f"src={src} knows {model.vocab_size}: not its tokenizer; "
            "set tokenizer.name and tokenizer.path"
        )
    if tokenizer.n_words < model.vocab_size:
        sizes = tokenizer.n_words, model.vocab_size
        log.warning("the tokenizer has %d tokens, the model %d: is it the model's own?", *sizes)
    return Model(_config(model, seq_len, named), state, tokenizer)


def _config(model: ModelConfig, seq_len: int, tokenizer: TokenizerConfig) -> TrainConfig:
    data = DataConfig(seq_len=seq_len, tokenizer=tokenizer)
    return TrainConfig(name="imported", data=data, model=model)


def _read_dcp(src: Place, tokenizer: TokenizerConfig, scratch: Path) -> Model:
    model, own, config, _ = load_for_inference(str(src), torch.device("cpu"))
    return Model(config, model.state_dict(), own)


def _read_torch(src: Path, tokenizer: TokenizerConfig, scratch: Path) -> Model:
    values = load_pth(src)
    config = _torch_config(src, values)
    if values["tokenizer"] is not None:
        file = scratch / TOKENIZER_FILE
        file.write_bytes(values["tokenizer"])
        config.data.tokenizer.path = str(file)
    state = take_own(values["model"], config.model, str(src))
    return Model(config, state, build_tokenizer(config.data.tokenizer))


def _torch_config(src: Path, values: dict[str, Any]) -> TrainConfig:
    if values.get("format") != _FORMAT or not values.keys() >= _PARTS:
        raise CheckpointError(
            f"{src}: was not written by to=torch; for a .pth of Meta or Lingua use from=meta"
        )
    try:
        config = from_dict(TrainConfig, values["config"])
        sizes_of(config.model)
    except (ConfigError, ValueError) as error:
        raise CheckpointError(f"{src}: its config: {error}") from error
    return config


def _read_safetensors(src: Path, tokenizer: TokenizerConfig, scratch: Path) -> Model:
    config = read_config(src)
    state = take_own(read_safetensors(src / WEIGHTS), config.model, str(src / WEIGHTS))
    return Model(config, state, build_tokenizer(config.data.tokenizer))


# ------------------------------------------------------------------ writing


def _write_dcp(dst: Path, model: Model) -> None:
    with torch.device("meta"):
        module = LanguageModel(model.config.model)
    module.load_state_dict(model.state, assign=True)
    save_model(dst, module, model.config, model.tokenizer)


def _write_torch(dst: Path, model: Model) -> None:
    file = model.tokenizer.file
    values = {
        "format": _FORMAT,
        "model": model.state,
        "config": portable_config(model.config, model.tokenizer),
        "tokenizer": None if file is None else file.read_bytes(),
    }
    with writing(dst):
        dst.absolute().parent.mkdir(parents=True, exist_ok=True)
        with replacing(dst) as stream:
            torch.save(values, stream)


def _write_hf(dst: Path, model: Model) -> None:
    config = model.config
    _check_exportable(config)
    tokenizer, seq_len = model.tokenizer, config.data.seq_len
    hf = config_to_hf(config.model, seq_len, tokenizer.bos_id, tokenizer.eos_id)
    with new_folder(dst) as folder:
        write_hf(folder, hf, state_to_hf(model.state, config.model))
        if tokenizer.file is not None:
            shutil.copyfile(tokenizer.file, folder / TOKENIZER_FILE)


def _write_safetensors(dst: Path, model: Model) -> None:
    with new_folder(dst) as folder:
        write_companions(folder, model.config, model.tokenizer)
        write_safetensors(folder / WEIGHTS, model.state)


def _check_exportable(config: TrainConfig) -> None:
    """Raise ConfigError for a model that Hugging Face's Llama cannot compute.

    Aggregation sites that never ran, because a sample is one chunk, are left out of an export.
    """
    m, seq_len = config.model, config.data.seq_len
    why = None
    if not has_one_chunk(m, seq_len):
        why = f"model.module_seq_len={m.module_seq_len}: attends within chunks of its samples"
    elif m.sliding_window is not None and m.sliding_window < seq_len:
        why = f"model.sliding_window={m.sliding_window}: attends within a window"
    elif m.mixer != "attention":
        why = f"model.mixer={m.mixer}: is not attention"
    elif m.module_names:
        why = f"model.module_names={','.join(m.module_names)}: has several columns"
    if why:
        raise ConfigError(
            f"to=hf: {why}, which Hugging Face's Llama cannot; use to=safetensors or to=torch"
        )


# Only a checkpoint may be a RemotePath.
READERS: dict[str, Callable[[Any, TokenizerConfig, Path], Model]] = {
    "hf": _read_hf,
    "meta": _read_meta,
    "torch": _read_torch,
    "safetensors": _read_safetensors,
    "dcp": _read_dcp,
}
WRITERS: dict[str, Callable[[Path, Model], None]] = {
    "dcp": _write_dcp,
    "torch": _write_torch,
    "safetensors": _write_safetensors,
    "hf": _write_hf,
}
