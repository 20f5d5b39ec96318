"""How many processes share what: the sizes of the mesh, and what tensor parallelism asks for.

Pure functions of the config, so that a dry run knows them; `modular_lm.parallel` acts on them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from modular_lm.config.schema import DistributedConfig, TrainConfig
from modular_lm.errors import ConfigError


@dataclass(frozen=True)
class MeshSizes:
    """dp_replicate groups, each of dp_shard ranks that hold the weights once between them, each of
    those of tp ranks that compute the same rows together.

    Rank = (replica * dp_shard + shard) * tp + tensor rank: TP peers are neighbours.
    """

    dp_replicate: int
    dp_shard: int
    tp: int

    @property
    def data(self) -> int:
        """Ranks with rows of their own, TP peers counted once: the data-parallel size."""
        return self.dp_replicate * self.dp_shard

    @property
    def world(self) -> int:
        return self.data * self.tp


def mesh_sizes(config: DistributedConfig, world_size: int) -> MeshSizes:
    """The mesh of `world_size` workers; sizes that are left out follow from it.

    Raises ConfigError for sizes that do not make `world_size`.
    """
    d, (data, rest) = config, divmod(world_size, config.tp_size)
    if d.fsdp_type == "no_shard":
        replicate, shard = d.dp_replicate or data, d.dp_shard or 1
    else:
        shard = d.dp_shard or data // (d.dp_replicate or 1)
        replicate = d.dp_replicate or data // shard if shard else 0
    if rest or replicate * shard != data or (d.fsdp_type == "no_shard" and shard > 1):
        raise ConfigError(
            f"distributed.dp_replicate={_shown(d.dp_replicate)}, dp_shard={_shown(d.dp_shard)}, "
            f"tp_size={d.tp_size}, fsdp_type={d.fsdp_type}: cannot be made of {world_size} "
            f"worker{'s' * (world_size > 1)}: dp_replicate x dp_shard x tp_size must be their "
            "number (with no_shard dp_shard=1); leave out the first two to have them chosen"
        )
    if d.fsdp_type != "no_shard" and shard == 1 and replicate > 1:
        raise ConfigError(
            f"distributed.dp_shard=1: leaves nothing to share for fsdp_type={d.fsdp_type} with "
            f"dp_replicate={replicate}; leave dp_shard out, or use distributed.fsdp_type=no_shard"
        )
    return MeshSizes(replicate, shard, d.tp_size)


def check_distributed(c: TrainConfig) -> None:
    """What can be seen of `distributed` before the number of workers is known. c: resolved

    Raises ConfigError.
    """
    try:
        re.compile(c.distributed.float8_filter)
    except re.error as error:
        raise ConfigError(
            f"distributed.float8_filter={c.distributed.float8_filter}: is no regular expression: "
            f"{error}"
        ) from None
    if c.distributed.tp_size > 1:
        _check_tensor_parallel(c)


def _check_tensor_parallel(c: TrainConfig) -> None:
    """What must divide by what."""
    tp, m = c.distributed.tp_size, c.model
    divided = {
        "model.n_heads": m.n_heads,
        "model.n_kv_heads": m.n_kv_heads,
        "model.multiple_of": m.multiple_of,
        "model.module_seq_len": m.module_seq_len,
        "data.seq_len": c.data.seq_len,
    }
    for name, value in divided.items():
        if value is not None and value % tp:
            raise ConfigError(
                f"distributed.tp_size={tp}: splits {name}={value}, which must be a multiple of it"
            )
    if m.vocab_size < tp * tp:
        raise ConfigError(
            f"distributed.tp_size={tp}: splits a vocabulary of {m.vocab_size} words, which is too "
            "small for that"
        )


def _shown(value: int | None) -> str:
    return "null" if value is None else str(value)
