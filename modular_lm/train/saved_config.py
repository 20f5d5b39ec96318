"""The config a checkpoint was written with, and what of it a run that starts from it must share.

Imports no torch, so that a checkpoint that does not fit is refused at once; the tensors themselves
are compared by `checkpoint.load_model`.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from modular_lm.config import ModelConfig, TokenizerConfig, TrainConfig
from modular_lm.config.checks import has_one_chunk
from modular_lm.config.load import from_dict
from modular_lm.errors import CheckpointError, ConfigError
from modular_lm.model.sizes import BASE, sizes_of
from modular_lm.storage import Place, RemotePath, local_copy, place
from modular_lm.tokenizer import Tokenizer, build_tokenizer
from modular_lm.train import inventory

log = logging.getLogger(__name__)

TOKENIZER_FILE = "tokenizer.model"
INIT_KEY = "checkpoint.init_ckpt_path"
_TRUNK = (
    *("dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "vocab_size", "weight_tying"),
    *("rope_theta", "norm_eps", "mixer"),
)
_SITES = ("module_agg", "module_n_layers")
# What the same weights compute with.
_READING = (
    *("module_seq_len", "module_lookback", "sliding_window"),
    *("module_n_summary", "module_pool", "module_sum_scale"),
)


def read_config(folder: Place) -> TrainConfig:
    """The resolved config a checkpoint was written with, its tokenizer the one that lies in it."""
    try:
        config = from_dict(TrainConfig, json.loads((folder / "params.json").read_text()))
    except (ConfigError, FileNotFoundError, ValueError) as error:
        raise CheckpointError(f"{folder / 'params.json'}: {error}") from error
    tokenizer = config.data.tokenizer
    if tokenizer.path == TOKENIZER_FILE:
        tokenizer.path = str(local_copy(folder / TOKENIZER_FILE))
    return config


def initial_format(path: str) -> str:
    """The format, of `conversion.READERS`, of the weights at a user's `init_ckpt_path`."""
    found = place(path)
    if isinstance(found, RemotePath):
        return "dcp"
    if found.is_file():
        return "meta" if (found.parent / "params.json").is_file() else "torch"
    if (found / inventory.COMPLETE).is_file() or not found.is_dir():
        return "dcp"
    if (found / "config.json").is_file():
        return "hf"
    if any(found.glob("consolidated*.pth")):
        return "meta"
    return "safetensors" if (found / "model.safetensors").is_file() else "dcp"


def absolute_initial(path: str) -> Place:
    """The very weights that `init_ckpt_path` names: a run's folder stands for its latest."""
    if initial_format(path) == "dcp":
        return inventory.find(path, INIT_KEY).resolve()
    return place(path).resolve()


def initial_config(path: str, tokenizer: TokenizerConfig | None = None) -> TrainConfig:
    """The config of the weights at `init_ckpt_path`. Raises CheckpointError or ConfigError.

    tokenizer: the one to assume where the format brings none.
    """
    kind, found = initial_format(path), absolute_initial(path)
    if kind == "dcp":
        return read_config(found)
    from modular_lm.train.conversion import read_foreign_config

    assert isinstance(found, Path)
    return read_foreign_config(kind, found, tokenizer)


def find_initial(config: TrainConfig, tokenizer: Tokenizer) -> Place:
    """The weights that `checkpoint.init_ckpt_path` of a resolved config names.

    Raises CheckpointError if there are none, ConfigError, naming the keys, if their trunk, their
    aggregation sites or their tokenizer are not this run's.
    """
    path = config.checkpoint.init_ckpt_path
    assert path is not None
    folder = absolute_initial(path)
    saved = initial_config(path, config.data.tokenizer)
    theirs = build_tokenizer(saved.data.tokenizer)
    if (theirs.name, theirs.content_hash) != (tokenizer.name, tokenizer.content_hash):
        raise ConfigError(
            f"{INIT_KEY}={folder}: its tokenizer ({_named(theirs)}) is not this run's "
            f"({_named(tokenizer)}); set data.tokenizer.name and data.tokenizer.path to it"
        )
    differing = model_differences(saved, config.model)
    reading = _reading_differences(saved.model, config.model)
    if config.model.module_route != BASE:
        # What the base computes would no longer be what it was.
        differing += reading
    elif reading and not has_one_chunk(saved.model, saved.data.seq_len):
        log.warning("%s=%s: was trained with %s", INIT_KEY, folder, "; ".join(reading))
    if differing:
        raise ConfigError(
            f"{INIT_KEY}={folder}: its model is another one: {'; '.join(differing)}; "
            f"set these keys as {_has(path)}"
        )
    return folder


def _has(path: str) -> str:
    return "its config.json has them" if initial_format(path) == "hf" else "in its params.json"


def model_differences(saved: TrainConfig, new: ModelConfig) -> list[str]:
    """The keys of `model.*` for which weights of `saved` have no place in another model, or would
    mean another function, each as `model.key: theirs there, ours here`."""
    differing = _differences(saved.model, new)
    if not has_one_chunk(saved.model, saved.data.seq_len):
        differing += _site_differences(saved.model, new)
    return differing


def _differences(saved: ModelConfig, new: ModelConfig) -> list[str]:
    """What differs in the trunk, as `model.key: theirs there, ours here`."""
    found = [_line(key, getattr(saved, key), getattr(new, key)) for key in _TRUNK]
    widths = sizes_of(saved).ffn_dim, sizes_of(new).ffn_dim
    found.append(_line("multiple_of and model.ffn_dim_multiplier (feed-forward width)", *widths))
    return [line for line in found if line]


def _site_differences(saved: ModelConfig, new: ModelConfig) -> list[str]:
    """What differs in sites that were trained; a checkpoint of `drop` has none."""
    if saved.module_agg == "drop" or (saved.module_n_layers or 1) >= saved.n_layers:
        return []
    keys = (*_SITES, "module_agg_dim") if saved.module_agg == "stack" else _SITES
    found = [_line(key, getattr(saved, key), getattr(new, key)) for key in keys]
    return [line for line in found if line]


def _reading_differences(saved: ModelConfig, new: ModelConfig) -> list[str]:
    keys = _READING if new.module_agg == "sum" else _READING[:-1]
    found = [_line(key, getattr(saved, key), getattr(new, key)) for key in keys]
    return [line for line in found if line]


def _line(key: str, theirs: Any, ours: Any) -> str:
    return "" if theirs == ours else f"model.{key}: {theirs} there, {ours} here"


def _named(tokenizer: Tokenizer) -> str:
    return f"{tokenizer.name} {tokenizer.content_hash[:8]}"
