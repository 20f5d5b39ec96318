"""Reading a Meta Lingua YAML: one table says what becomes of each of its keys.

Keys that both projects have need no entry. Every other key of Lingua's `TrainArgs` is `MAPPED` to
one of ours, `IGNORED` with a warning (it steers machinery that does not exist here) or `REFUSED`
with the reason (to drop it silently would train something else), unless it holds a value that means
"off" anyway.
"""

from __future__ import annotations

import logging
from typing import Any

from modular_lm.errors import ConfigError

log = logging.getLogger(__name__)

_IGNORED: dict[str, str] = {
    "data.load_async": "Ray Data streams in the background",
    "data.prefetch_size": "Ray Data prefetches by itself",
    "data.n_views": "samples overlap by the one target token",
    "model.max_seqlen": "data.seq_len says it",
    "model.seed": "the top-level seed says it",
    "gc_collect_freq": "not needed",
    "probe_freq": "not available yet",
    "async_eval_gpus": "not available yet",
    "env": "set the environment of the job instead",
    "profiling": "not available yet",
    "logging.acc_freq": "every line of metrics is of a whole optimizer step",
    "logging.wandb": "runs are tracked in MLflow (logging.mlflow)",
    "distributed.spawn_method": "Ray starts the workers",
    "distributed.matmul_allow_tf32": "PyTorch's default holds",
    "distributed.compile_cache_size_limit": "PyTorch's default holds",
    "eval.harness": "not available yet",
    "eval.generator": "not available yet",
    "eval.name": "evaluations belong to their run",
    "eval.dump_dir": "evaluations belong to their run",
    "eval.metric_log_dir": "evaluations belong to their run",
    "eval.ckpt_dir": "evaluations belong to their run",
    "eval.wandb": "runs are tracked in MLflow (logging.mlflow)",
    "eval.validation.max_steps": "eval.validation.max_docs limits the validation",
    "eval.validation.use_val_from_train_src": "validation documents come with each source",
    "optim.annealing_step": "no schedule of Lingua's reads it",
}

# key -> (values that mean "off", reason)
_REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "distributed.detect_anomaly": ((False, None), "anomaly detection is not available"),
    "checkpoint.continue_training_from_init": (
        (False, None),
        "init_ckpt_path gives weights only, and the same command again continues a run",
    ),
    "eval.validation.root_dir": ((None, ""), "validation documents come with each source"),
    "eval.validation.sources": ((None, []), "validation documents come with each source"),
    "model.init_std_factor": (("disabled", None), "initial weights are not scaled with depth"),
    "model.n_future_head": ((1, None), "multi-token prediction is not available yet"),
    "data.add_bos": ((True, None), "it is decided when the shards are prepared"),
    "data.add_eos": ((True, None), "it is decided when the shards are prepared"),
    "optim.cosine_theta": ((1, 1.0, None), "the cosine schedule has no exponent"),
}


# key -> (our key, Lingua's value -> ours)
_MAPPED: dict[str, tuple[str, dict[Any, Any]]] = {
    "distributed.selective_activation_checkpointing": (
        "distributed.activation_checkpointing",
        {False: "none", True: "selective"},
    ),
}


def translate_lingua(values: dict[str, Any]) -> None:
    """Take Lingua's own keys out of the values of a training job, in place.

    Raises ConfigError for a key whose meaning would be lost.
    """
    for dotted, (ours, meanings) in _MAPPED.items():
        found, value = _pop(values, dotted)
        if found and value not in list(meanings):
            raise ConfigError(f"{dotted}={value}: expected one of {', '.join(map(str, meanings))}")
        if found:
            parent, _, leaf = ours.rpartition(".")
            values[parent].setdefault(leaf, meanings[value])
    for dotted, why in _IGNORED.items():
        if _pop(values, dotted)[0]:
            log.warning("config: %s is ignored: %s", dotted, why)
    for dotted, (off, why) in _REFUSED.items():
        found, value = _pop(values, dotted)
        if found and value not in off:
            raise ConfigError(f"{dotted}={value}: cannot be honoured: {why}; remove the key")
    tokenizer = (values.get("data") or {}).get("tokenizer") or {}
    if (
        isinstance(tokenizer, dict)
        and tokenizer.get("name", "bytes") == "bytes"
        and tokenizer.get("path")
    ):
        log.warning("config: data.tokenizer.path is ignored: bytes need no file")
        del tokenizer["path"]


def _pop(values: dict[str, Any], dotted: str) -> tuple[bool, Any]:
    *parents, leaf = dotted.split(".")
    for parent in parents:
        child = values.get(parent)
        if not isinstance(child, dict):
            return False, None
        values = child
    return (True, values.pop(leaf)) if leaf in values else (False, None)
