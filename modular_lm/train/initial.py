"""The weights that a new run starts from: a checkpoint of ours, or files of another project.

Every rank reads its part of a checkpoint. Other files are read by rank 0, as a whole, and sent to
the others tensor by tensor, so that only rank 0 needs memory for all of them.
"""

from __future__ import annotations

from pathlib import Path
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict

from modular_lm.config import TokenizerConfig, TrainConfig
from modular_lm.model.init import fill
from modular_lm.parallel import World
from modular_lm.storage import place
from modular_lm.train.checkpoint import load_model, log_weights, missing_in
from modular_lm.train.conversion import read_foreign
from modular_lm.train.saved_config import initial_format


def load_initial(path: str, model: nn.Module, tokenizer: TokenizerConfig, world: World) -> set[str]:
    """Load what `checkpoint.init_ckpt_path` names into `model`, sharded or plain. A collective.

    Returns the parameters that it lacks, which stay as they are (`checkpoint.load_model`). Raises
    AgreedError if the weights are damaged or of another model.
    """
    source, kind = place(path), initial_format(path)
    if kind == "dcp":
        return load_model(source, model, world)
    assert isinstance(source, Path)
    failure = f"the weights of {source} cannot be used"
    weights: dict[str, Tensor] = {}

    def read() -> tuple[dict[str, tuple[int, ...]], TrainConfig] | None:
        if world.rank:
            return None
        found = read_foreign(kind, source, tokenizer)
        weights.update(found.state)
        return {name: tuple(t.shape) for name, t in found.state.items()}, found.config

    about = world.together(read, failure)[0]
    assert about is not None
    state = cast("dict[str, Tensor]", get_model_state_dict(model))

    def compare() -> set[str]:
        wanted = {name: tuple(tensor.shape) for name, tensor in state.items()}
        return missing_in(about[0], wanted, about[1])

    kept = world.together(compare, failure)[0]
    for name in sorted(state.keys() - kept):
        fill(state[name], _sent(weights.pop(name, None), state[name].shape, world))
    if world.rank == 0:
        log_weights(source, kept)
    return kept


def _sent(whole: Tensor | None, shape: torch.Size, world: World) -> Tensor:
    """Rank 0's tensor, in fp32, which the others lack. A collective."""
    whole = torch.empty(shape) if whole is None else whole.float().contiguous()
    dist.broadcast(whole, group=world.control, group_src=0)
    return whole
