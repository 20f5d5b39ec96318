"""Llama checkpoints in Meta's format and in Meta Lingua's: one `.pth` and a `params.json`.

Names and the order of rotary pairs are ours already. Meta's release is `consolidated.00.pth` with
the sizes in `params.json`; Lingua's is the `consolidated.pth` that its `consolidate_checkpoints`
writes, {"model": tensors, ...}, with the config of its run in `params.json`, sizes below `model`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modular_lm.config.schema import ModelConfig
from modular_lm.errors import CheckpointError, reason
from modular_lm.model.foreign import (
    EMBEDDING,
    HEAD,
    dense_config,
    read_json,
    real,
    size,
    take_own,
    without_tied_head,
)

PARAMS = "params.json"
_FILES = ("consolidated.00.pth", "consolidated.pth")
_SECOND_SHARD = "consolidated.01.pth"
# Buffers that follow from the config.
_DERIVED = ("rope.freqs", "freqs_cis", "rope_embeddings.freqs_cis")
# Lingua's name for the head of a tied model.
_LINGUA_TIED_HEAD = "output.tied_module.weight"
_FFN_WIDTH_OF = "layers.0.feed_forward.w1.weight"

_SIZES = ("dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "norm_eps", "rope_theta")
# Without influence on what a trained model computes, or said better by the tensors.
_IGNORED = (
    *("vocab_size", "hidden_dim", "multiple_of", "ffn_dim_multiplier"),
    *("max_seq_len", "max_seqlen", "max_batch_size", "seed"),
    *("init_base_std", "init_std_factor", "rope_use_fp32_in_outer_product"),
)
_TIED = ("weight_tying", "tied_embeddings")


def config_from_meta(
    params: Mapping[str, Any], tensors: Mapping[str, Tensor], where: str = PARAMS
) -> tuple[ModelConfig, int]:
    """The resolved model config of a `params.json`, and the longest context it was made for.

    The vocabulary and the feed-forward width are read off the tensors: Meta's files may say -1.
    Raises CheckpointError, naming `where` and the key, for anything but a plain Llama.
    """
    nested = params.get("model")
    sizes: Mapping[str, Any] = nested if isinstance(nested, dict) else params
    for key, value in sizes.items():
        known = key in (*_SIZES, *_IGNORED, *_TIED) or (key == "n_future_head" and value == 1)
        if not known and value not in (None, False):
            raise CheckpointError(
                f"{where}: {key}={json.dumps(value)}: not known of a plain Llama, "
                "the model cannot be imported"
            )
    missing = [name for name in (EMBEDDING, _FFN_WIDTH_OF) if name not in tensors]
    if missing:
        raise CheckpointError(f"{where}: tensor {missing[0]} is missing beside it")
    seq_len = size(sizes, "max_seq_len", where, sizes.get("max_seqlen") or 2048)
    dim = size(sizes, "dim", where)
    if sizes.get("head_dim") is None:
        heads = size(sizes, "n_heads", where)
        head_dim = dim // heads or 1
    else:
        head_dim = size(sizes, "head_dim", where)
        heads = size(sizes, "n_heads", where, dim // head_dim)
    return dense_config(
        ffn_dim=tensors[_FFN_WIDTH_OF].shape[0],
        seq_len=seq_len,
        where=where,
        dim=dim,
        n_layers=size(sizes, "n_layers", where),
        n_heads=heads,
        n_kv_heads=size(sizes, "n_kv_heads", where, heads),
        head_dim=head_dim,
        vocab_size=tensors[EMBEDDING].shape[0],
        norm_eps=real(sizes, "norm_eps", where, 1e-5),
        rope_theta=real(sizes, "rope_theta", where, 10000.0),
        weight_tying=any(sizes.get(key) for key in _TIED),
    ), seq_len


def state_from_meta(
    tensors: Mapping[str, Tensor], config: ModelConfig, where: str
) -> dict[str, Tensor]:
    """Meta's or Lingua's tensors as a state dict of `LanguageModel(config)`, in fp32.

    Raises CheckpointError, naming `where` and the tensor that is missing, superfluous or of
    another shape or type.
    """
    given = {name: tensor for name, tensor in tensors.items() if name not in _DERIVED}
    if config.weight_tying:
        for head in (HEAD, _LINGUA_TIED_HEAD):
            given = without_tied_head(given, head, EMBEDDING, where)
    return take_own(given, config, where)


def read_meta(path: Path) -> tuple[ModelConfig, int, dict[str, Tensor]]:
    """Model config, longest context and state dict of a folder, or of a `.pth` file in one.

    Holds the whole model in fp32. Raises CheckpointError, naming the file and what is wrong.
    """
    file = _weight_file(path)
    params = file.parent / PARAMS
    values = read_json(params)
    tensors = load_pth(file)
    tensors = tensors.get("model", tensors)
    if not isinstance(tensors, dict) or not all(isinstance(t, Tensor) for t in tensors.values()):
        raise CheckpointError(f'{file}: expected a dict of tensors, or one under "model"')
    config, seq_len = config_from_meta(values, tensors, str(params))
    return config, seq_len, state_from_meta(tensors, config, str(file))


def load_pth(file: Path) -> dict[str, Any]:
    """The dict that a `.pth` file holds, on the CPU; no code in it is run.

    Raises CheckpointError, naming the file.
    """
    try:
        values = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # arbitrary bytes make the unpickler raise almost anything
        why = reason(error).split(". ")[0]
        raise CheckpointError(f"{file}: not readable as a torch file of weights: {why}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{file}: expected a dict, found a {type(values).__name__}")
    return values


def _weight_file(path: Path) -> Path:
    if path.is_file():
        found = path
    else:
        files = [path / name for name in _FILES if (path / name).is_file()]
        if not files:
            raise CheckpointError(f"{path}: holds neither {' nor '.join(_FILES)}")
        found = files[0]
    if found.name == _FILES[0] and (found.parent / _SECOND_SHARD).exists():
        raise CheckpointError(
            f"{found.parent / _SECOND_SHARD}: the model is split over several files "
            "(model parallelism); merge them first, e.g. import its Hugging Face version"
        )
    return found
