"""What the importers of other projects' Llama checkpoints share (`hf`, `meta`).

A plain Llama is this project's dense model: full attention, no biases, rotary embeddings without
scaling, SwiGLU. Importers turn a foreign description into a `ModelConfig` and foreign tensors into
a state dict of `LanguageModel`; every tensor has to be accounted for.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modular_lm.config.checks import resolve_model
from modular_lm.config.schema import ModelConfig
from modular_lm.errors import CheckpointError, ConfigError
from modular_lm.model.lm import LanguageModel
from modular_lm.model.sizes import sizes_of

EMBEDDING, HEAD = "tok_embeddings.weight", "output.weight"
_EXACT_IN_FP32 = (torch.float32, torch.bfloat16, torch.float16)


def dense_config(ffn_dim: int, seq_len: int, where: str, **keys: Any) -> ModelConfig:
    """The resolved config of a dense model of this feed-forward width; `keys` as in `model.*`.

    Raises CheckpointError, naming `where`, for sizes that contradict each other.
    """
    multiple, multiplier = ffn_rule(keys["dim"], ffn_dim)
    model = ModelConfig(
        **keys, module_agg="drop", multiple_of=multiple, ffn_dim_multiplier=multiplier
    )
    try:
        config = resolve_model(model, seq_len, model.vocab_size)
    except ConfigError as error:
        raise CheckpointError(f"{where}: {error}") from error
    assert sizes_of(config).ffn_dim == ffn_dim
    return config


def ffn_rule(dim: int, width: int) -> tuple[int, float | None]:
    """(multiple_of, ffn_dim_multiplier) for which Llama's rule gives exactly `width`.

    Where rounding up alone can give it, the smallest such multiple and no multiplier.
    """
    base = int(2 * 4 * dim / 3)
    if width < base:
        # Half a unit above the width, so that no rounding of the product falls below it.
        return 1, (width + 0.5) / base
    return next(m for m in range(width - base + 1, width + 1) if width % m == 0), None


def take_state(
    given: Mapping[str, Tensor], names: Mapping[str, str], config: ModelConfig, where: str
) -> dict[str, Tensor]:
    """`given` under our names and in fp32, if it is exactly what a model of `config` needs.

    names: their name of each parameter -> ours. Raises CheckpointError, naming `where` and the
    tensor by their name.
    """
    shapes = parameter_shapes(config)
    for name in given:
        if name not in names:
            raise CheckpointError(f"{where}: tensor {name} has no place in this model")
    state = {}
    for name, ours in names.items():
        if name not in given:
            raise CheckpointError(f"{where}: tensor {name} is missing")
        tensor, shape = given[name], shapes[ours]
        if tuple(tensor.shape) != shape:
            raise CheckpointError(
                f"{where}: tensor {name} has the shape {list(tensor.shape)}, "
                f"expected {list(shape)} from its config"
            )
        if tensor.dtype not in _EXACT_IN_FP32:
            raise CheckpointError(
                f"{where}: tensor {name} is {tensor.dtype}, expected fp32, bf16 or fp16: "
                "quantised checkpoints cannot be imported"
            )
        state[ours] = tensor.to(torch.float32)
    return state


def take_own(given: Mapping[str, Tensor], config: ModelConfig, where: str) -> dict[str, Tensor]:
    """`take_state` for tensors that have our names."""
    return take_state(given, {name: name for name in parameter_shapes(config)}, config, where)


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter of a model of `config`, by name; allocates nothing."""
    with torch.device("meta"):
        model = LanguageModel(config)
    return {name: tuple(p.shape) for name, p in model.named_parameters()}


def without_tied_head(
    given: Mapping[str, Tensor], head: str, embedding: str, where: str
) -> dict[str, Tensor]:
    """`given` without the copy of the embedding that some save as the head of a tied model.

    Raises CheckpointError if it is no copy.
    """
    rest = dict(given)
    copy = rest.pop(head, None)
    if copy is not None and embedding in rest and not torch.equal(copy, rest[embedding]):
        raise CheckpointError(
            f"{where}: tensor {head} differs from {embedding}, "
            "but the config says that they are tied"
        )
    return rest


def read_json(file: Path) -> dict[str, Any]:
    """A file that holds one JSON object. Raises CheckpointError, naming it."""
    if not file.is_file():
        raise CheckpointError(f"{file}: no such file")
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file}: not readable as JSON: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{file}: expected a JSON object, found a {type(values).__name__}")
    return values


def size(values: Mapping[str, Any], key: str, where: str, default: int | None = None) -> int:
    """A positive whole number of a foreign config; `default` where it is absent or null.

    Raises CheckpointError.
    """
    value = _given(values, key, default)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise CheckpointError(f"{where}: {key}={value}: expected a whole number >= 1")
    return value


def real(values: Mapping[str, Any], key: str, where: str, default: float) -> float:
    """A positive number of a foreign config; `default` where it is absent or null.

    Raises CheckpointError.
    """
    value = _given(values, key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
        raise CheckpointError(f"{where}: {key}={value}: expected a number > 0")
    return float(value)


def _given(values: Mapping[str, Any], key: str, default: Any) -> Any:
    value = values.get(key)
    return default if value is None else value
