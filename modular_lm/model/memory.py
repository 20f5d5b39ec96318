"""What training a model takes of a worker's memory, as a formula."""

from __future__ import annotations

from dataclasses import dataclass

from modular_lm.config import TrainConfig
from modular_lm.config.distributed import MeshSizes, mesh_sizes
from modular_lm.model.flops import parameters, trained_matrices, trained_parameters
from modular_lm.model.sizes import sizes_of

# In fp32: weights, then of those that learn gradients and the two moments of AdamW; Muon has one.
_WEIGHT_BYTES, _LEARNING_BYTES, _MUON_SAVES = 4, 12, 4


@dataclass(frozen=True)
class Memory:
    """What a worker needs, in bytes.

    state: weights, gradients and the optimizer's moments, this worker's part; copies: weights and
    gradients that are whole for a while; activations: what backward needs of a micro-batch
    """

    state: float
    copies: float
    activations: float

    @property
    def total(self) -> float:
        return self.state + self.copies + self.activations


def memory_estimate(config: TrainConfig, world_size: int) -> Memory:
    """What one of `world_size` workers needs.

    State is 16 bytes a parameter that learns (12 under Muon) and 4 of any other, over all that
    share them; the rest is a rough estimate.
    """
    mesh, m = mesh_sizes(config.distributed, world_size), config.model
    total, trained = parameters(m).total, trained_parameters(m)
    state = _WEIGHT_BYTES * total + _LEARNING_BYTES * trained
    if config.optim.name == "muon":
        state -= _MUON_SAVES * trained_matrices(m)
    share = state / (mesh.dp_shard * mesh.tp)
    return Memory(share, _copies(config, mesh), _activations(config, mesh.tp))


def _copies(config: TrainConfig, mesh: MeshSizes) -> float:
    """Weights to compute with, all or (full_shard) those of two layers, embedding and head; and,
    while gradients of several micro-batches add up, those of all."""
    size, count = _compute_bytes(config), parameters(config.model)
    if mesh.world == 1 and size == _WEIGHT_BYTES:
        return 0
    held = count.total
    if mesh.dp_shard > 1 and config.distributed.fsdp_type == "full_shard":
        held = count.embedding + count.head + 2 * count.layers / config.model.n_layers
    adding = 4 * trained_parameters(config.model) if config.grad_acc_steps > 1 else 0
    return (size * held + adding) / mesh.tp


def _activations(config: TrainConfig, tp: int) -> float:
    """Per token: in each layer what backward needs of attention (about 8 dim) and feed-forward (2
    dim and 4 hidden), or what recomputation keeps and one whole layer; logits twice in fp32.

    Tensor parallelism splits all but the gathered inputs of attention and feed-forward.
    """
    z, size = sizes_of(config.model), _compute_bytes(config)
    gathered = 0 if tp == 1 else 2 * z.dim * (1 - 1 / tp)
    layer = (10 * z.dim + 4 * z.ffn_dim) / tp + gathered
    matmuls = 2 * z.attn_dim + 2 * z.kv_dim + 2 * z.dim + 2 * z.ffn_dim
    kept = {
        "none": z.n_layers * layer,
        "selective": z.n_layers * (z.dim + matmuls) / tp + layer,
        "full": z.n_layers * z.dim / tp + layer,
    }[config.distributed.activation_checkpointing]
    tokens = config.data.batch_size * config.data.seq_len
    return tokens * (kept * size + 2 * 4 * z.vocab_size / tp)


def _compute_bytes(config: TrainConfig) -> int:
    return 2 if config.distributed.model_dtype == "bf16" else 4
