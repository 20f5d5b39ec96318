"""Tensor parallelism with sequence parallelism: a few neighbouring ranks compute the same rows.

Matrices are split by heads, by hidden units and by words. Between layers each peer holds a share of
the tokens of every chunk, S / p of S, so that norms and residuals are split as well; attention and
feed-forward gather the tokens before their first matrices and scatter the sums after their last
one (Megatron-LM, arXiv:2205.05198). Sites read whole chunks: the tokens are gathered for them;
`stack` splits its heads, what is left of the sites (norms, and one small matrix in `avg` and `sum`)
every peer computes in full. The head splits the vocabulary, and no rank ever holds the logits of
all words (`losses`). All parameters are DTensors of the same mesh.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_module
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from modular_lm.model.aggregation import MemoryAttention
from modular_lm.model.columns import layers_of
from modular_lm.model.layers import precise
from modular_lm.model.lm import LanguageModel
from modular_lm.model.spread import IGNORE

_TOKENS = Shard(1)
"""How h: [N, S, D] lies between layers."""


def make_tensor_parallel(model: LanguageModel, mesh: DeviceMesh) -> None:
    """Spread a model over the ranks of a one-dimensional mesh, in place. Before data parallelism.

    Parameters become DTensors that all require gradients.
    """
    for name in model.column_names:
        for block in layers_of(model, name):
            parallelize_module(block, mesh, _block_plan())
    for site in model.aggs:
        plan = _attention_site_plan() if isinstance(site, MemoryAttention) else _sum_site_plan()
        parallelize_module(site, mesh, plan)
    whole = Replicate()
    plan: dict[str, ParallelStyle] = {
        "tok_embeddings": RowwiseParallel(input_layouts=whole, output_layouts=whole),
        "norm": _InFull(),
    }
    if model.output is not None:
        plan["output"] = ColwiseParallel()  # called by no one: `TensorSpread` uses the weight
    parallelize_module(model, mesh, plan)
    model.spread = TensorSpread(mesh)


def _block_plan() -> dict[str, ParallelStyle]:
    gather = {"input_layouts": _TOKENS, "desired_input_layouts": Replicate()}
    attention = {
        "input_layouts": (_TOKENS, None, None),
        "desired_input_layouts": (Replicate(), None, None),
    }
    return {
        "attention_norm": SequenceParallel(),
        "attention": PrepareModuleInput(**attention),  # type: ignore[arg-type]
        "attention.wq": ColwiseParallel(),
        "attention.wk": ColwiseParallel(),
        "attention.wv": ColwiseParallel(),
        "attention.wo": RowwiseParallel(output_layouts=_TOKENS),
        "ffn_norm": SequenceParallel(),
        "feed_forward": PrepareModuleInput(**gather),  # type: ignore[arg-type]
        "feed_forward.w1": ColwiseParallel(),
        "feed_forward.w3": ColwiseParallel(),
        "feed_forward.w2": RowwiseParallel(output_layouts=_TOKENS),
    }


def _attention_site_plan() -> dict[str, ParallelStyle]:
    return {
        "norm": _InFull(),
        "query_norm": _InFull(),
        "wq": ColwiseParallel(),
        "wk": ColwiseParallel(),
        "wv": ColwiseParallel(),
        "wo": RowwiseParallel(output_layouts=Replicate()),
    }


def _sum_site_plan() -> dict[str, ParallelStyle]:
    return {"norm": _InFull(), "wo": _InFull()}


class _InFull(ParallelStyle):
    """Every peer computes the same, from the same input."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        def wrap(_: nn.Module, inputs: tuple[Tensor, ...], mesh: DeviceMesh) -> Any:
            return tuple(_as_whole(x, mesh) for x in inputs)

        def unwrap(_: nn.Module, output: DTensor, mesh: DeviceMesh) -> Any:
            return output.to_local()

        return distribute_module(module, device_mesh, input_fn=wrap, output_fn=unwrap)


class TensorSpread:
    """See `model.spread.Spread`. All peers pass, and get, the same values, but for shares."""

    def __init__(self, mesh: DeviceMesh) -> None:
        self._mesh = mesh

    def scatter(self, h: Tensor) -> Tensor:
        return _as_whole(h, self._mesh).redistribute(placements=[_TOKENS]).to_local()

    def gather(self, h: Tensor) -> Tensor:
        return _as(h, self._mesh, _TOKENS).full_tensor()

    def logits(self, h: Tensor, weight: Tensor) -> Tensor:
        return F.linear(_as_whole(h, self._mesh), weight).full_tensor()  # type: ignore[attr-defined]

    def losses(self, h: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        """log Σ exp minus the target's logit; of both, each peer has its words' part."""
        assert isinstance(weight, DTensor)
        # What flows back into h here is the part of some words: summed over the peers.
        h = _as_whole(h, self._mesh).to_local(grad_placements=[Partial()])
        mine = weight.to_local()
        logits = F.linear(h, mine)
        logits = logits.to(precise(logits.dtype))
        top = _reduced(logits.detach().amax(1), self._mesh, "max")
        total = _reduced((logits - top[:, None]).exp().sum(1), self._mesh, "sum")
        place = targets - self._mesh.get_local_rank() * -(-weight.shape[0] // self._mesh.size())
        is_mine = (place >= 0) & (place < len(mine))
        chosen = logits.gather(1, torch.where(is_mine, place, 0)[:, None])[:, 0]
        chosen = _reduced(torch.where(is_mine, chosen, 0), self._mesh, "sum")
        return torch.where(targets == IGNORE, 0, total.log() + top - chosen)


def _as(x: Tensor, mesh: DeviceMesh, placement: Any) -> DTensor:
    return DTensor.from_local(x, mesh, [placement], run_check=False)


def _as_whole(x: Tensor, mesh: DeviceMesh) -> DTensor:
    return _as(x, mesh, Replicate())


def _reduced(x: Tensor, mesh: DeviceMesh, how: str) -> Tensor:
    """Of all peers' `x`; the gradient of a sum is that of each part."""
    return cast("Tensor", _as(x, mesh, Partial(how)).full_tensor())
