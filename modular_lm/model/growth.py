"""Adding a column to a model that is held whole, outside of training.

A run with `create_module_name` gets its column by itself (`train.trainer`); this is for columns
that are not trained here: imported, merged of others, or only prepared.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from modular_lm.model.columns import layers_of
from modular_lm.model.init import init_weights
from modular_lm.model.lm import LanguageModel


def with_column(model: LanguageModel, name: str, seed: int) -> LanguageModel:
    """A model with one more column, drawn as in a run of this seed; all else is as in `model`."""
    names = [*model.config.module_names, name]
    grown = LanguageModel(dataclasses.replace(model.config, module_names=names))
    grown.to(model.tok_embeddings.weight)  # device and type
    init_weights(grown, seed)
    grown.load_state_dict(model.state_dict(), strict=False)
    return grown


def mean_of(model: LanguageModel, names: Sequence[str]) -> dict[str, Tensor]:
    """The weights of a column that is the mean of others, the base allowed among them."""
    columns = [layers_of(model, name) for name in names]
    return {
        key: torch.stack([column.get_parameter(key).detach() for column in columns]).mean(0)
        for key, _ in columns[0].named_parameters()
    }


@torch.no_grad()
def fill_column(model: LanguageModel, name: str, weights: Mapping[str, Tensor]) -> None:
    """Give a column these weights, by their names within it."""
    for key, parameter in layers_of(model, name).named_parameters():
        parameter.copy_(weights[key])
