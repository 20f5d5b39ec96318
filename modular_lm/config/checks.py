"""Conditions that involve several keys: what defaults resolve to, what cannot run, and what may
change when a run is continued. Pure functions of the config; files are checked by their readers.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from typing import Any

from modular_lm.config.columns import resolve_columns
from modular_lm.config.distributed import check_distributed, mesh_sizes
from modular_lm.config.load import to_dict
from modular_lm.config.optim import check_optim, warnings_of_optim
from modular_lm.config.schema import ModelConfig, RayConfig, TrainConfig
from modular_lm.errors import ConfigError

# What decides the function that is trained, and what its optimizer remembers of it: fixed for the
# life of a run. The data and their order are held, too, but by a fingerprint of what they are, not
# by keys and paths (data/fingerprint.py).
FIXED = ("seed", "model", "data.document_mask", "optim.name")
# Say how a command ends or what it prints, not what it computes.
_TRANSIENT = ("dry_run", "stop_at", "data.allow_change")


def resolve(config: TrainConfig, vocab_size: int) -> TrainConfig:
    """A copy with every default that depends on other keys written out as a value.

    `vocab_size` is the tokenizer's. Raises ConfigError where keys contradict each other.
    """
    sources = _normalised(config.data.sources, "data.sources")
    data = dataclasses.replace(config.data, sources=sources, stages=_stages(config.data.stages))
    if data.seed is None:
        data = dataclasses.replace(data, seed=config.seed)
    model = resolve_model(config.model, config.data.seq_len, vocab_size)
    resolved = dataclasses.replace(config, data=data, model=model, dump_dir=dump_dir_of(config))
    _check_run(resolved)
    return resolved


def dump_dir_of(config: TrainConfig) -> str:
    """Folder of the run, as given or by its name."""
    return config.dump_dir or f"runs/{config.name}"


def resolve_model(model: ModelConfig, seq_len: int, vocab_size: int) -> ModelConfig:
    """A copy of the model's config with all numbers filled in. Raises ConfigError."""
    if model.vocab_size not in (-1, vocab_size) and model.vocab_size < vocab_size:
        raise ConfigError(
            f"model.vocab_size={model.vocab_size}: the tokenizer has {vocab_size} tokens; "
            "use -1 or at least that many"
        )
    if model.n_heads is None and model.head_dim is not None and model.dim % model.head_dim:
        raise ConfigError(
            f"model.head_dim={model.head_dim}: must divide model.dim={model.dim} "
            "when model.n_heads is not given"
        )
    heads = model.n_heads or (model.dim // model.head_dim if model.head_dim else 8)
    if model.head_dim is None and model.dim % heads:
        raise ConfigError(f"model.dim={model.dim}: must be divisible by model.n_heads={heads}")
    head_dim = model.head_dim or model.dim // heads
    kv_heads = model.n_kv_heads or heads
    chunk = min(model.module_seq_len or seq_len, seq_len)
    per_sample = math.ceil(seq_len / chunk) * model.module_n_summary
    resolved = dataclasses.replace(
        model,
        n_heads=heads,
        head_dim=head_dim,
        n_kv_heads=kv_heads,
        vocab_size=vocab_size if model.vocab_size == -1 else model.vocab_size,
        module_agg="avg" if model.module_agg == "mean" else model.module_agg,
        module_n_layers=model.module_n_layers or max(1, model.n_layers // 4),
        module_agg_dim=model.module_agg_dim or max(1, model.dim // 4),
        module_sum_scale=model.module_sum_scale or 1.0 / per_sample,
    )
    resolved = resolve_columns(resolved)
    _check_model(resolved)
    return resolved


def has_one_chunk(m: ModelConfig, seq_len: int) -> bool:
    """Whether a sample is one chunk, so that aggregation sites never run: a dense model."""
    return m.module_seq_len is None or m.module_seq_len >= seq_len


def _stages(stages: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """By step, and each with weights that sum to 1."""
    for step in stages:
        if not (step.isdecimal() and int(step) > 0):
            raise ConfigError(
                f"data.stages.{step}: expected a step > 0 from which its weights hold; those of "
                "the beginning stand in data.sources"
            )
    return {
        str(step): _normalised(weights, f"data.stages.{step}")
        for step, weights in sorted((int(s), weights) for s, weights in stages.items())
    }


def _normalised(sources: dict[str, float], key: str) -> dict[str, float]:
    if not sources:
        raise ConfigError(f"{key}={{}}: expected at least one source")
    for name, weight in sources.items():
        if not (weight > 0 and math.isfinite(weight)):
            raise ConfigError(f"{key}.{name}={weight}: expected a weight > 0")
    total = sum(sources.values())
    # By name: the order in which a file lists its sources must not decide the order of the data.
    return {name: sources[name] / total for name in sorted(sources)}


def _check_model(m: ModelConfig) -> None:
    assert m.n_heads
    assert m.head_dim
    assert m.n_kv_heads
    assert m.module_agg_dim
    if m.n_heads % m.n_kv_heads:
        raise ConfigError(f"model.n_kv_heads={m.n_kv_heads}: must divide model.n_heads={m.n_heads}")
    if m.head_dim % 2:
        raise ConfigError(
            f"model.head_dim={m.head_dim}: must be even, rotary embeddings turn pairs"
        )
    if m.module_seq_len is not None and m.module_seq_len % m.module_n_summary:
        raise ConfigError(
            f"model.module_n_summary={m.module_n_summary}: must divide "
            f"model.module_seq_len={m.module_seq_len}"
        )
    if m.module_seq_len is not None and m.module_lookback > m.module_seq_len:
        raise ConfigError(
            f"model.module_lookback={m.module_lookback}: only the chunk before is looked at; use "
            f"at most model.module_seq_len={m.module_seq_len}"
        )
    if m.module_seq_len is not None and m.sliding_window is not None:
        raise ConfigError(
            f"model.sliding_window={m.sliding_window}: is for a model without chunks; use "
            "model.module_seq_len=null, or model.module_lookback to see over the border of a chunk"
        )
    if m.module_agg == "stack" and m.module_agg_dim % (2 * m.n_heads):
        raise ConfigError(
            f"model.module_agg_dim={m.module_agg_dim}: `stack` splits it over model.n_heads="
            f"{m.n_heads} heads of an even width: use a multiple of {2 * m.n_heads}"
        )
    if int(8 * m.dim / 3 * (m.ffn_dim_multiplier or 1.0)) < 1:
        raise ConfigError(
            f"model.ffn_dim_multiplier={m.ffn_dim_multiplier}: leaves no feed-forward width"
        )


def world_sizes(ray: RayConfig) -> tuple[int, int]:
    """The fewest and the most workers that a run may have."""
    n = ray.num_workers
    return (n, n) if isinstance(n, int) else (n[0], n[1])


def largest_world(c: TrainConfig, at_most: int) -> int:
    """The most workers that `ray.num_workers` allows and that form the mesh; 0 if none do."""
    fewest, most = world_sizes(c.ray)
    for n in range(min(most, at_most), fewest - 1, -1):
        with contextlib.suppress(ConfigError):
            return mesh_sizes(c.distributed, n).world
    return 0


def _check_run(c: TrainConfig) -> None:
    n = c.ray.num_workers
    if isinstance(n, list) and (len(n) != 2 or n[0] > n[1]):
        raise ConfigError(
            f"ray.num_workers=[{','.join(map(str, n))}]: expected a number, or [min,max] with min "
            "not above max"
        )
    if isinstance(n, list):
        for workers in n:
            mesh_sizes(c.distributed, workers)
    if c.stop_at is not None and c.stop_at > c.steps:
        raise ConfigError(f"stop_at={c.stop_at}: lies behind the last step, steps={c.steps}")
    if not c.name or "/" in c.name or c.name.startswith("."):
        raise ConfigError(f"name={c.name}: expected a name that can be a folder's")
    if c.model.create_module_name is not None and c.checkpoint.init_ckpt_path is None:
        raise ConfigError(
            f"model.create_module_name={c.model.create_module_name}: a column is added to a "
            "trained model; name its checkpoint in checkpoint.init_ckpt_path"
        )
    if c.model.module_train == "new" and c.checkpoint.init_ckpt_path is None:
        raise ConfigError(
            "model.module_train=new: leaves all but the column as it is, and without "
            "checkpoint.init_ckpt_path that is not trained yet; name a checkpoint, or use all"
        )
    if c.model.create_module_name is None and c.model.create_module_init != "copy":
        raise ConfigError(
            f"model.create_module_init={c.model.create_module_init}: no column is created; "
            "name it in model.create_module_name"
        )
    check_optim(c.optim)
    _check_attention(c)
    check_distributed(c)


def _check_attention(c: TrainConfig) -> None:
    """Backends that can work on no machine, or on no CPU; the others are tried at the start."""
    impl, m = c.distributed.attn_impl, c.model
    if impl in ("flex", "xformers") and c.ray.use_gpu is False:
        raise ConfigError(
            f"distributed.attn_impl={impl}: trains on GPUs only, and ray.use_gpu=false; use auto"
        )
    reads = m.module_agg == "stack" and not has_one_chunk(m, c.data.seq_len)
    if impl == "xformers" and reads:
        raise ConfigError(
            "distributed.attn_impl=xformers: has no kernel for the memory attention of "
            "model.module_agg=stack; use auto, which may still take xformers for the rest"
        )


def warnings_of(c: TrainConfig) -> list[str]:
    """What is allowed but probably not meant."""
    found = warnings_of_optim(c.optim, c.steps)
    if late := [step for step in c.data.stages if int(step) >= c.steps]:
        found.append(f"data.stages.{late[0]} is never reached: the run ends after steps={c.steps}")
    m, chunk = c.model, c.model.module_seq_len
    if m.module_agg != "drop":
        key = f"model.module_agg={m.module_agg}"
        if has_one_chunk(m, c.data.seq_len):
            found.append(
                f"{key} cannot act: a sample of data.seq_len={c.data.seq_len} is one chunk "
                f"(model.module_seq_len={_shown(chunk)}); this is a dense model, and "
                "model.module_agg=drop spares the parameters of its aggregation"
            )
        elif m.module_n_layers is not None and m.module_n_layers >= m.n_layers:
            found.append(
                f"{key} cannot act: model.module_n_layers={m.module_n_layers} leaves one module "
                f"of all {m.n_layers} layers, with no place for an aggregation between modules"
            )
    if m.module_lookback and has_one_chunk(m, c.data.seq_len):
        found.append(
            f"model.module_lookback={m.module_lookback} cannot act: a sample of data.seq_len="
            f"{c.data.seq_len} is one chunk (model.module_seq_len={_shown(chunk)})"
        )
    if m.sliding_window is not None and m.sliding_window >= c.data.seq_len:
        found.append(
            f"model.sliding_window={m.sliding_window} cannot act: a sample has data.seq_len="
            f"{c.data.seq_len} tokens"
        )
    curve = c.eval.validation.chunk_len
    if curve is not None and curve >= c.data.seq_len:
        found.append(
            f"eval.validation.chunk_len={curve}: a sample of data.seq_len={c.data.seq_len} is one "
            "chunk, so no curves of the loss by position are written"
        )
    if m.module_names and m.module_lookback:
        found.append(
            f"model.module_lookback={m.module_lookback}: chunks cannot be routed by evidence "
            "(route=auto) among columns that look back; each column works alone"
        )
    others = [name for name in ("base", *m.module_names) if name != m.module_route]
    if others and m.module_train == "all":
        found.append(
            f"model.module_train=all: what all columns share learns, so that the outputs of "
            f"{', '.join(others)} change too, and columns cannot be moved to or from the old base"
        )
    return found


def _shown(value: int | None) -> str:
    return "null" if value is None else str(value)


def global_batch_size(c: TrainConfig, world_size: int) -> int:
    """Samples per optimizer step on `world_size` workers, of which TP peers share theirs.

    Raises ConfigError if they cannot form the mesh that `distributed` asks for.
    """
    return c.data.batch_size * c.grad_acc_steps * mesh_sizes(c.distributed, world_size).data


def changes(old: TrainConfig, new: TrainConfig) -> tuple[list[str], list[str]]:
    """Compare the resolved config of an earlier attempt with a new one.

    Returns the changed keys as `key: old -> new`: first those that a run may not change, then
    those that it may.
    """
    before, after = flatten(to_dict(old)), flatten(to_dict(new))
    refused, allowed = [], []
    for name in sorted(before.keys() | after.keys()):
        if name in _TRANSIENT or before.get(name) == after.get(name):
            continue
        line = f"{name}: {before.get(name)} -> {after.get(name)}"
        fixed = any(name == f or name.startswith(f + ".") for f in FIXED)
        (refused if fixed else allowed).append(line)
    return refused, allowed


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat
