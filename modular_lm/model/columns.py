"""Named columns: layers beside those of the base model that chunks can run through instead.

A column is one whole set of layers. That of the base is `layers.*`, the others are
`columns.<name>.layers.*`. Embedding, head, norms and aggregation sites are shared by all: chunks of
different columns read each other's summaries. So a column can be added to a trained model, trained
while all else stays as it is, to the bit, and taken out again.

Which column a chunk runs through is said by a number: 0 is the base, 1 + i `module_names[i]`. How
it is chosen is not decided here: by the config, or by `routing`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from modular_lm.config.schema import ColumnInit, ModelConfig
from modular_lm.model.block import Block
from modular_lm.model.mixers import Segments
from modular_lm.model.sizes import BASE, column_number

_OUTPUTS = ("attention.wo.weight", "feed_forward.w2.weight")


class Column(nn.Module):
    """The layers of one column."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layers))


def layers_of(model: nn.Module, name: str) -> nn.ModuleList:
    """The layers of a column of a `LanguageModel`. Raises KeyError if it has none of this name."""
    owner = model if name == BASE else model.get_submodule("columns")[name]  # type: ignore[index]
    return owner.layers  # type: ignore[return-value]


def run_columns(
    columns: Sequence[nn.ModuleList],
    layers: range,
    h: Tensor,
    segments: Segments,
    routes: Tensor,
) -> Tensor:
    """Some layers over chunks of several columns.

    h: [N, S, D], row n to go through column `routes[n]` ([N], int64); returns the same shape.
    """
    out, placed = torch.zeros_like(h), 0
    for number, column in enumerate(columns):
        rows = (routes == number).nonzero()[:, 0]
        # Sharded weights are gathered by all ranks together: each runs every column, if need be
        # over a row that is not its own.
        some = rows if len(rows) else rows.new_zeros(1)
        part, of_part = h[some], segments.select(some)
        for i in layers:
            part, _ = column[i](part, of_part, None)
        out = out.index_copy(0, rows, part[: len(rows)])
        placed += len(rows)
    assert placed == len(h), "a route is the number of no column"
    return out


@torch.no_grad()
def begin_column(model: nn.Module, name: str, init: ColumnInit) -> None:
    """Give a new column its first weights; those of `model` are drawn or loaded already.

    copy: the base's, so that nothing changes at first. fresh: as drawn for its name, with outputs
    of zero, so that at first its layers do nothing.
    """
    base = layers_of(model, BASE)
    for key, parameter in layers_of(model, name).named_parameters():
        if init == "copy":
            parameter.copy_(base.get_parameter(key))
        elif key.endswith(_OUTPUTS):
            parameter.zero_()


def freeze(model: nn.Module, config: ModelConfig) -> None:
    """Leave gradients only to what `module_train` lets learn: new: the column of `module_route`;
    all: what is shared, too. Columns that no chunk runs through never learn.
    """
    route = column_prefix(config.module_route or BASE)
    for name, parameter in model.named_parameters():
        in_column = name.startswith(("layers.", "columns."))
        learns = name.startswith(route) if in_column else config.module_train == "all"
        parameter.requires_grad_(learns)


def column_prefix(name: str) -> str:
    """How the names of a column's parameters begin."""
    return "layers." if name == BASE else f"columns.{name}.layers."


def default_route(config: ModelConfig) -> int:
    """The number of the column that chunks run through where nothing else is said."""
    return column_number(config, config.module_route or BASE)
