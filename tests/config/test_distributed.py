"""The sizes of the mesh: what is left out is chosen, what is impossible refused in one line."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modular_lm.config import TrainConfig, load_config
from modular_lm.config.checks import global_batch_size, resolve
from modular_lm.config.distributed import MeshSizes, mesh_sizes
from modular_lm.config.schema import DistributedConfig
from modular_lm.errors import ConfigError


@pytest.mark.parametrize(
    ("keys", "world_size", "expected"),
    [
        ({}, 8, (1, 8, 1)),
        ({"tp_size": 2}, 8, (1, 4, 2)),
        ({"dp_shard": 2}, 8, (4, 2, 1)),
        ({"dp_replicate": 2}, 8, (2, 4, 1)),
        ({"dp_replicate": 2, "tp_size": 2}, 8, (2, 2, 2)),
        ({"fsdp_type": "no_shard"}, 8, (8, 1, 1)),
        ({"fsdp_type": "no_shard", "dp_shard": 1, "dp_replicate": 4, "tp_size": 2}, 8, (4, 1, 2)),
        ({"fsdp_type": "shard_grad_op", "tp_size": 8}, 8, (1, 1, 8)),
        ({"dp_shard": 1}, 1, (1, 1, 1)),
    ],
)
def test_what_is_left_out_is_chosen(keys: dict, world_size: int, expected: tuple[int, ...]) -> None:
    assert mesh_sizes(DistributedConfig(**keys), world_size) == MeshSizes(*expected)


@pytest.mark.parametrize(
    ("keys", "world_size"),
    [
        ({"tp_size": 3}, 8),
        ({"tp_size": 16}, 8),
        ({"dp_shard": 3}, 8),
        ({"dp_shard": 16}, 8),
        ({"dp_replicate": 3}, 8),
        ({"dp_replicate": 16}, 8),
        ({"dp_replicate": 2, "dp_shard": 2}, 8),
        ({"fsdp_type": "no_shard", "dp_shard": 8}, 8),
        ({"fsdp_type": "no_shard", "dp_replicate": 2}, 8),
    ],
)
def test_impossible_sizes_are_refused_with_all_of_them(keys: dict, world_size: int) -> None:
    with pytest.raises(ConfigError) as caught:
        mesh_sizes(DistributedConfig(**keys), world_size)
    message = str(caught.value)
    for name, value in keys.items():
        assert f"{name}={value}" in message
    assert "cannot be made of 8 workers" in message


def test_shards_of_one_are_no_shards() -> None:
    with pytest.raises(ConfigError, match="leave dp_shard out, or use"):
        mesh_sizes(DistributedConfig(dp_shard=1), 4)


@given(
    st.sampled_from(["full_shard", "shard_grad_op", "no_shard"]),
    st.none() | st.integers(1, 12),
    st.none() | st.integers(1, 12),
    st.integers(1, 4),
    st.integers(1, 24),
)
def test_a_mesh_has_a_place_for_every_worker(
    fsdp_type, replicate: int | None, shard: int | None, tp: int, world_size: int
) -> None:
    config = DistributedConfig(fsdp_type, replicate, shard, tp)
    try:
        sizes = mesh_sizes(config, world_size)
    except ConfigError:
        assert world_size % tp or (replicate, shard) != (None, None)
        return
    assert sizes.world == world_size
    assert sizes.tp == tp
    assert replicate in (None, sizes.dp_replicate)
    assert shard in (None, sizes.dp_shard)


def config(*args: str) -> TrainConfig:
    return resolve(load_config(TrainConfig, list(args))[0], 258)


def test_tensor_parallel_peers_share_their_samples() -> None:
    c = config("data.batch_size=3", "grad_acc_steps=5", "distributed.tp_size=4")
    assert global_batch_size(c, 8) == 3 * 5 * 2


@pytest.mark.parametrize(
    "keys",
    [
        ["model.n_heads=2", "model.head_dim=8"],
        ["model.n_kv_heads=2"],
        ["model.multiple_of=2"],
        ["model.module_seq_len=6"],
        ["data.seq_len=30"],
    ],
    ids=lambda keys: keys[0],
)
def test_what_tensor_parallelism_splits_must_be_divisible(keys: list[str]) -> None:
    config(*keys)
    with pytest.raises(ConfigError) as caught:
        config(*keys, "distributed.tp_size=4")
    assert f"distributed.tp_size=4: splits {keys[0]}" in str(caught.value)


def test_linguas_name_for_recomputation_is_understood() -> None:
    for value, ours in (("true", "selective"), ("false", "none")):
        given = f"distributed.selective_activation_checkpointing={value}"
        assert config(given).distributed.activation_checkpointing == ours
    with pytest.raises(ConfigError, match="selective_activation_checkpointing=2: expected one of"):
        config("distributed.selective_activation_checkpointing=2")


def test_a_filter_must_be_a_regular_expression() -> None:
    with pytest.raises(ConfigError, match=r"float8_filter=\(: is no regular expression"):
        config("distributed.float8_filter=(")
