"""What `dry_run=true` prints: the resolved config and what the run would cost. Imports no torch."""

from __future__ import annotations

from modular_lm.config import TrainConfig, to_dict, to_yaml
from modular_lm.config.checks import global_batch_size, warnings_of
from modular_lm.config.distributed import MeshSizes, mesh_sizes
from modular_lm.model.flops import (
    flops_per_token,
    parameters,
    state_elements,
    trained_parameters,
)
from modular_lm.model.memory import memory_estimate
from modular_lm.model.sizes import column_names

_MIB = 2**20


def describe(config: TrainConfig, world_size: int) -> str:
    """The resolved config as YAML, then parameters, FLOPs, memory, steps and tokens."""
    batch = global_batch_size(config, world_size)
    tokens = batch * config.data.seq_len
    stop = config.stop_at or config.steps
    per_token = flops_per_token(config.model, config.data.seq_len)
    count = parameters(config.model)
    need, mesh = memory_estimate(config, world_size), mesh_sizes(config.distributed, world_size)
    rows = [
        ("parameters", f"{count.total:,} ({count.non_embedding:,} without embeddings)"),
        *_columns(config),
        ("FLOPs per token", f"{per_token:.4g} (forward and backward)"),
        (
            "decoding state",
            f"{state_elements(config.model, config.data.seq_len):,} numbers per sequence of "
            f"{config.data.seq_len:,} tokens",
        ),
        (
            "memory per worker",
            f"about {need.total / _MIB:,.0f} MiB: {need.state / _MIB:,.0f} weights, gradients and "
            f"optimizer, {need.copies / _MIB:,.0f} whole copies, {need.activations / _MIB:,.0f} "
            "activations",
        ),
        ("workers", f"{world_size}{_shape(mesh)}"),
        ("samples per step", f"{batch:,}"),
        ("tokens per step", f"{tokens:,}"),
        ("steps", f"{stop:,}" + (f" of {config.steps:,}" if stop != config.steps else "")),
        ("tokens in all", f"{stop * tokens:,}"),
        ("FLOPs in all", f"{stop * tokens * per_token:.4g}"),
    ]
    lines = [to_yaml(to_dict(config)), *(f"{name:<18} {value}" for name, value in rows)]
    lines += [f"warning: {text}" for text in warnings_of(config)]
    return "\n".join(lines)


def _columns(config: TrainConfig) -> list[tuple[str, str]]:
    m = config.model
    if m.module_train == "all" and not m.module_names:
        return []
    shared = " and what all share" if m.module_train == "all" else ""
    learning = f"{m.module_route}{shared}, {trained_parameters(m):,} parameters"
    return [("columns", ", ".join(column_names(m))), ("learning", learning)]


def _shape(mesh: MeshSizes) -> str:
    parts = [
        (mesh.dp_replicate, "replicas"),
        (mesh.dp_shard, "shards"),
        (mesh.tp, "tensor parallel"),
    ]
    shown = [f"{n} {what}" for n, what in parts if n > 1]
    return f" ({' x '.join(shown)})" if shown else ""
