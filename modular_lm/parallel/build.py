"""From a config to a model spread over the ranks, with its initial weights."""

from __future__ import annotations

import logging

import torch

from modular_lm.config import TrainConfig
from modular_lm.config.checks import has_one_chunk
from modular_lm.model.attention import choose_backends
from modular_lm.model.columns import freeze, layers_of
from modular_lm.model.init import init_weights
from modular_lm.model.lm import LanguageModel
from modular_lm.parallel.float8 import convert_to_float8
from modular_lm.parallel.mesh import TP
from modular_lm.parallel.recompute import recompute
from modular_lm.parallel.sharding import DTYPES, shard
from modular_lm.parallel.tensor import make_tensor_parallel
from modular_lm.parallel.world import World

log = logging.getLogger(__name__)


def build_model(config: TrainConfig, world: World) -> LanguageModel:
    """A model spread as `config.distributed` says, with its initial weights, which depend on `seed`
    and the parameters' names alone.

    Built without memory on the meta device and materialised part by part, so that no rank ever
    holds the whole model. Raises AgreedError if what is asked for cannot be used here.
    """
    with torch.device("meta"):
        model = LanguageModel(config.model)
    world.together(lambda: _choose_kernels(model, config, world), "this cannot be computed")
    if world.tp_size > 1:
        make_tensor_parallel(model, world.mesh[TP])
    freeze(model, config.model)
    if has_one_chunk(config.model, config.data.seq_len):
        # With one chunk a sample no aggregation runs: such weights get no gradients, and the
        # optimizer must not wait for any.
        model.aggs.requires_grad_(False)
    for name in model.column_names:
        for block in layers_of(model, name):
            # In this order: what is compiled is what runs between FSDP's hooks, recomputation too.
            recompute(block, config.distributed)
            if config.distributed.compile:
                block.forward = torch.compile(block.forward)
    shard(model, config.distributed, world.mesh)
    model.to_empty(device=world.device)
    init_weights(model, config.seed)
    return model


def _choose_kernels(model: LanguageModel, config: TrainConfig, world: World) -> None:
    """What computes attention and linear layers on this rank. Raises ConfigError."""
    c = config.distributed
    model.backends = choose_backends(
        c.attn_impl,
        config.model,
        seq_len=config.data.seq_len,
        document_mask=config.data.document_mask,
        device=world.device,
        dtype=DTYPES[c.model_dtype],
    )
    converted = convert_to_float8(model, c, world.device)
    if converted and world.rank == 0:
        log.info("float8 (%s): %d linear layers", c.float8_recipe, converted)
