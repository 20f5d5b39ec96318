"""What `dry_run=true` prints: the resolved config and what the run would cost. Imports no torch."""

from __future__ import annotations

from modular_lm.config import TrainConfig, to_dict, to_yaml
from modular_lm.config.checks import global_batch_size, warnings_of
from modular_lm.model.flops import (
    flops_per_token,
    parameters,
    state_elements,
    trained_matrices,
    trained_parameters,
)
from modular_lm.model.sizes import column_names, sizes_of

# In fp32: weights, then of those that learn gradients and the two moments of AdamW; Muon has one.
_WEIGHT_BYTES, _LEARNING_BYTES, _MUON_SAVES = 4, 12, 4


def describe(config: TrainConfig, world_size: int) -> str:
    """The resolved config as YAML, then parameters, FLOPs, memory, steps and tokens."""
    batch = global_batch_size(config, world_size)
    tokens = batch * config.data.seq_len
    stop = config.stop_at or config.steps
    per_token = flops_per_token(config.model, config.data.seq_len)
    count = parameters(config.model)
    state, activations = memory_estimate(config, world_size)
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
            f"about {state + activations:,.0f} MiB: {state:,.0f} weights, "
            f"gradients and optimizer, {activations:,.0f} activations",
        ),
        ("workers", f"{world_size}"),
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


def memory_estimate(config: TrainConfig, world_size: int) -> tuple[float, float]:
    """(state, activations) of one worker in MiB.

    State is 16 bytes a parameter that learns (12 under Muon) and 4 of any other, sharded.
    Activations are a rough estimate for a micro-batch without recomputation: per token and layer
    what backward needs of attention (about 8 dim) and of the feed-forward (about 2 dim + 4 hidden),
    and logits twice in fp32.
    """
    m, d = config.model, config.data
    state = _WEIGHT_BYTES * parameters(m).total + _LEARNING_BYTES * trained_parameters(m)
    if config.optim.name == "muon":
        state -= _MUON_SAVES * trained_matrices(m)
    size = 2 if config.distributed.model_dtype == "bf16" else 4
    tokens = d.batch_size * d.seq_len
    per_layer = (10 * m.dim + 4 * sizes_of(m).ffn_dim) * size
    logits = 2 * 4 * m.vocab_size
    activations = tokens * (m.n_layers * per_layer + logits)
    return state / world_size / 2**20, activations / 2**20
