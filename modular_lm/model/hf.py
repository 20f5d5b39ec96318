"""Llama checkpoints of Hugging Face: their names, their config, their order of rotary pairs.

A folder holds `config.json` and `model.safetensors`, or several safetensors files and
`model.safetensors.index.json`. Hugging Face's Llama turns element i of a head together with element
i + d / 2 (half-split RoPE), Meta's and ours neighbouring elements (interleaved): the same function
after a permutation of the rows of wq and wk. Tokenizers are the caller's.
"""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from modular_lm.config.schema import ModelConfig
from modular_lm.errors import CheckpointError
from modular_lm.model.foreign import (
    EMBEDDING,
    HEAD,
    dense_config,
    read_json,
    real,
    size,
    take_state,
    without_tied_head,
)
from modular_lm.model.sizes import sizes_of

CONFIG, WEIGHTS = "config.json", "model.safetensors"
_INDEX = f"{WEIGHTS}.index.json"
_HF_EMBEDDING, _HF_HEAD = "model.embed_tokens.weight", "lm_head.weight"

_LAYER = {
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
}
# key -> the values with which a model computes what a plain Llama does
_PLAIN: dict[str, tuple[Any, ...]] = {
    "model_type": ("llama",),
    "architectures": (["LlamaForCausalLM"], None),
    "hidden_act": ("silu", None),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "rope_scaling": (None,),
    "sliding_window": (None,),
    "partial_rotary_factor": (1.0, None),
    "quantization_config": (None,),
}


# ------------------------------------------------------------------ config


def config_from_hf(hf: Mapping[str, Any], where: str = CONFIG) -> tuple[ModelConfig, int]:
    """The resolved model config of a `config.json`, and the longest context it was made for.

    Raises CheckpointError, naming `where` and the key, for anything but a plain Llama.
    """
    for key, plain in _PLAIN.items():
        if hf.get(key) not in plain:
            wanted = " or ".join(json.dumps(value) for value in plain)
            raise CheckpointError(
                f"{where}: {key}={json.dumps(hf.get(key))}: not a plain Llama, expected {wanted}"
            )
    hidden = size(hf, "hidden_size", where)
    heads = size(hf, "num_attention_heads", where)
    seq_len = size(hf, "max_position_embeddings", where, 2048)
    return dense_config(
        ffn_dim=size(hf, "intermediate_size", where),
        seq_len=seq_len,
        where=where,
        dim=hidden,
        n_layers=size(hf, "num_hidden_layers", where),
        n_heads=heads,
        n_kv_heads=size(hf, "num_key_value_heads", where, heads),
        head_dim=size(hf, "head_dim", where, hidden // heads or 1),
        vocab_size=size(hf, "vocab_size", where),
        norm_eps=real(hf, "rms_norm_eps", where, 1e-6),
        rope_theta=_rope_theta(hf, where),
        weight_tying=bool(hf.get("tie_word_embeddings", False)),
    ), seq_len


def _rope_theta(hf: Mapping[str, Any], where: str) -> float:
    """From `rope_theta`, or from the `rope_parameters` that transformers 5 writes in its place."""
    parameters = hf.get("rope_parameters") or {}
    if not isinstance(parameters, dict) or parameters.get("rope_type", "default") != "default":
        raise CheckpointError(
            f"{where}: rope_parameters={json.dumps(parameters)}: not a plain Llama, "
            "expected the rope_type default"
        )
    return real({**hf, **parameters}, "rope_theta", where, 10000.0)


def config_to_hf(
    config: ModelConfig, seq_len: int, bos_token_id: int, eos_token_id: int
) -> dict[str, Any]:
    """The `config.json` of a dense model, for contexts of up to `seq_len` tokens."""
    sizes = sizes_of(config)
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": sizes.dim,
        "intermediate_size": sizes.ffn_dim,
        "num_hidden_layers": sizes.n_layers,
        "num_attention_heads": sizes.n_heads,
        "num_key_value_heads": sizes.n_kv_heads,
        "head_dim": sizes.head_dim,
        "vocab_size": sizes.vocab_size,
        "max_position_embeddings": seq_len,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": None,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": config.weight_tying,
        "bos_token_id": bos_token_id,
        "eos_token_id": eos_token_id,
        "torch_dtype": "float32",
    }


# ------------------------------------------------------------------ tensors


def state_from_hf(
    tensors: Mapping[str, Tensor], config: ModelConfig, where: str = WEIGHTS
) -> dict[str, Tensor]:
    """Hugging Face's tensors as a state dict of `LanguageModel(config)`, in fp32.

    Raises CheckpointError, naming `where` and the tensor that is missing, superfluous or of
    another shape or type.
    """
    # Buffers that old versions of transformers saved; they follow from the config.
    given = {n: t for n, t in tensors.items() if not n.endswith(".rotary_emb.inv_freq")}
    if config.weight_tying:
        given = without_tied_head(given, _HF_HEAD, _HF_EMBEDDING, where)
    state = take_state(given, _names(config), config, where)
    for name, heads in _rotated(config).items():
        state[name] = _interleaved(state[name], heads)
    return state


def state_to_hf(state: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """The reverse of `state_from_hf`; `state` holds the parameters of a dense model, no others."""
    rotated = _rotated(config)
    tensors = {}
    for theirs, ours in _names(config).items():
        tensor = state[ours]
        tensors[theirs] = _half_split(tensor, rotated[ours]) if ours in rotated else tensor
    return tensors


def _names(config: ModelConfig) -> dict[str, str]:
    """Hugging Face's name of each parameter -> ours."""
    names = {_HF_EMBEDDING: EMBEDDING, "model.norm.weight": "norm.weight"}
    if not config.weight_tying:
        names[_HF_HEAD] = HEAD
    for i in range(config.n_layers):
        for theirs, ours in _LAYER.items():
            names[f"model.layers.{i}.{theirs}.weight"] = f"layers.{i}.{ours}.weight"
    return names


def _rotated(config: ModelConfig) -> dict[str, int]:
    """The matrices whose outputs are rotated -> the heads of each."""
    sizes = sizes_of(config)
    heads = {"wq": sizes.n_heads, "wk": sizes.n_kv_heads}
    return {
        f"layers.{i}.attention.{name}.weight": n
        for i in range(sizes.n_layers)
        for name, n in heads.items()
    }


def _interleaved(weight: Tensor, heads: int) -> Tensor:
    """Rows of each head from (half, pair) to (pair, half); weight: [heads * d, D]."""
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2).contiguous()


def _half_split(weight: Tensor, heads: int) -> Tensor:
    """Rows of each head from (pair, half) to (half, pair); weight: [heads * d, D]."""
    return weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2).contiguous()


# ------------------------------------------------------------------ files


def read_hf(folder: Path) -> tuple[ModelConfig, int, dict[str, Tensor]]:
    """Model config, longest context and state dict of a Hugging Face folder.

    Holds the whole model in fp32. Raises CheckpointError, naming the file and what is wrong.
    """
    file = folder / CONFIG
    config, seq_len = config_from_hf(read_json(file), str(file))
    tensors = {}
    for path, names in _weight_files(folder).items():
        tensors |= read_safetensors(path, names)
    return config, seq_len, state_from_hf(tensors, config, str(folder))


def write_hf(folder: Path, hf: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write `config.json` and `model.safetensors` into an existing folder. Raises OSError."""
    (folder / CONFIG).write_text(json.dumps(hf, indent=2) + "\n", encoding="utf-8")
    write_safetensors(folder / WEIGHTS, tensors)


def write_safetensors(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors, none of which share memory, to one file. Raises OSError."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        # safetensors writes files that only their owner can read; these get the usual mode.
        file.touch()
        mode = file.stat().st_mode
        save_file(dict(tensors), file, metadata={"format": "pt"})
        file.chmod(mode)
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        code = int(number[1]) if number else errno.EIO
        raise OSError(code, os.strerror(code), str(file)) from error


def _weight_files(folder: Path) -> dict[Path, list[str] | None]:
    """The files that hold the weights -> the tensors to take from each (None: all)."""
    if (folder / WEIGHTS).is_file():
        return {folder / WEIGHTS: None}
    if not (folder / _INDEX).is_file():
        raise CheckpointError(
            f"{folder}: holds neither {WEIGHTS} nor {_INDEX}; save the model in safetensors format"
        )
    files: dict[Path, list[str] | None] = {}
    weight_map = read_json(folder / _INDEX).get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"{folder / _INDEX}: expected a weight_map of tensors to files")
    for name, file in weight_map.items():
        names = files.setdefault(folder / str(file), [])
        assert names is not None
        names.append(name)
    return files


def read_safetensors(file: Path, names: list[str] | None = None) -> dict[str, Tensor]:
    """The tensors of a file, or those named. Raises CheckpointError, naming the file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as opened:
            return {name: opened.get_tensor(name) for name in names or opened.keys()}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file}: not readable as safetensors: {error}") from error
