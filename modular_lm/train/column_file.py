"""One column of a model as a file, to be added to a checkpoint of the same base elsewhere.

The file is for torch.load(weights_only=True): {"format", "name", "config": what decides the
shapes and the function of its layers, "base_hash", "weights": {name within the column: tensor},
"digest": SHA-256 of all this}; torch.load itself takes no notice of damaged tensors.
A column works with the embedding, the head and the sites that it was trained beside, and reads
summaries that the base's layers wrote: so it belongs to one base, which `base_hash` names.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modular_lm.errors import CheckpointError
from modular_lm.files import replacing, writing
from modular_lm.model.columns import layers_of
from modular_lm.model.lm import LanguageModel
from modular_lm.model.meta import load_pth
from modular_lm.model.sizes import sizes_of

FORMAT = "modular_lm column 1"
DIGITS = 12
"""How much of a hash is shown to people."""

_KEYS = ("dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "ffn_dim")
_MODEL_KEYS = ("rope_theta", "norm_eps", "mixer", "module_agg")


@dataclass(frozen=True)
class ColumnFile:
    """What a file holds of a column."""

    format: str
    name: str
    config: dict[str, Any]
    base_hash: str
    weights: dict[str, Tensor]
    digest: str


def write_column(model: LanguageModel, name: str, file: Path) -> None:
    """Write the column `name` of a plain model. Raises RunFailedError if it cannot be written."""
    weights = {key: p.detach() for key, p in layers_of(model, name).named_parameters()}
    about = name, _config(model), base_hash(model)
    column = ColumnFile(FORMAT, *about, weights, _digest(weights, *about))
    with writing(file):
        file.absolute().parent.mkdir(parents=True, exist_ok=True)
        with replacing(file) as stream:
            torch.save(vars(column), stream)


def read_column(file: Path, model: LanguageModel) -> ColumnFile:
    """The column of a file that `write_column` wrote of a model with the same base as `model`.

    Raises CheckpointError for a file that is damaged or something else, and for another base.
    """
    values = load_pth(file)
    if values.get("format") != FORMAT or values.keys() != ColumnFile.__annotations__.keys():
        raise CheckpointError(f"{file}: is not a column written by ray_jobs.modules action=export")
    column = ColumnFile(**values)
    if not _is_whole(column):
        raise CheckpointError(f"{file}: its content is not what its digest says: damaged")
    ours = base_hash(model)
    if ours != column.base_hash:
        raise CheckpointError(
            f"{file}: the column {column.name} belongs to the base {column.base_hash[:DIGITS]}, "
            f"this model's base is {ours[:DIGITS]}: add it to a checkpoint of its own base "
            "(action=list shows it), or train a new column on this one"
        )
    here = _config(model)
    differing = [key for key in here if column.config.get(key) != here[key]]
    if differing:
        lines = (f"{key}: {column.config.get(key)} there, {here[key]} here" for key in differing)
        raise CheckpointError(f"{file}: the column is of another model: {'; '.join(lines)}")
    return column


def base_hash(model: LanguageModel) -> str:
    """SHA-256 of all that is in no column beside the base: the layers of the base and what all
    columns share; over names, shapes and fp32 values."""
    return _hash((n, p) for n, p in model.named_parameters() if not n.startswith("columns."))


def column_hash(model: LanguageModel, name: str) -> str:
    """SHA-256 of the layers of a column: that of two columns with the same weights is the same."""
    return _hash(layers_of(model, name).named_parameters())


def _hash(tensors: Iterable[tuple[str, Tensor]], about: str = "") -> str:
    digest = hashlib.sha256(about.encode())
    for name, tensor in sorted(tensors, key=lambda each: each[0]):
        digest.update(f"{name}{list(tensor.shape)}\n".encode())
        values = tensor.detach().to("cpu", torch.float32).contiguous().numpy()
        digest.update(values.astype("<f4", copy=False).data)
    return digest.hexdigest()


def _digest(weights: dict[str, Tensor], *about: Any) -> str:
    return _hash(weights.items(), json.dumps(about, sort_keys=True))


def _is_whole(column: ColumnFile) -> bool:
    try:
        about = column.name, column.config, column.base_hash
        return column.digest == _digest(column.weights, *about)
    except (AttributeError, TypeError, ValueError):  # not even of the right types
        return False


def _config(model: LanguageModel) -> dict[str, Any]:
    sizes = sizes_of(model.config)
    decided = {key: getattr(sizes, key) for key in _KEYS}
    return decided | {key: getattr(model.config, key) for key in _MODEL_KEYS}
