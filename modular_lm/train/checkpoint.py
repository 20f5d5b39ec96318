"""Saving and loading checkpoints, on any number of ranks: with all that training needs to go on, or
the model alone.

Which checkpoints exist, and when one is whole, is decided in `inventory`. A checkpoint's folder
holds `.metadata` and `*.distcp` (torch.distributed.checkpoint: loadable by any number of ranks),
`params.json` (the resolved config), `train_state.json` (where training stands), the tokenizer's
file if it has one, so that a checkpoint can be moved on its own, and `COMPLETE`. One of a model
alone has neither optimizer nor `train_state.json`; a run can start from it (or from the model of
any other) but not continue it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import shutil
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)

from modular_lm.config import TrainConfig, to_dict
from modular_lm.config.checks import has_one_chunk
from modular_lm.errors import CheckpointError
from modular_lm.files import new_folder, write_text_atomic
from modular_lm.model.lm import LanguageModel
from modular_lm.parallel import World
from modular_lm.tokenizer import Tokenizer, build_tokenizer
from modular_lm.train import inventory
from modular_lm.train.saved_config import TOKENIZER_FILE, read_config

log = logging.getLogger(__name__)

# What a model may have beyond the checkpoint whose weights it starts from: both leave its function
# as it was, for sites start with a zero output and columns as copies of the base or silent.
_ADDED = ("aggs.", "columns.")


@dataclass(frozen=True)
class TrainState:
    """Where training stands: `step` optimizer steps are done, of `global_batch_size` samples.

    data_digest: hexadecimal, of all samples seen (`data.fingerprint.digest`); skipped, spikes: as
    `stability` counts them.
    """

    step: int
    global_batch_size: int
    tokens: int
    data_digest: str
    skipped: int = 0
    spikes: int = 0


def _state_dict(
    model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]
) -> tuple[dict[str, Any], Any]:
    """What is saved of a training: the weights, and by their names what optimizers keep of each.

    Beside it the parameter groups, which are not saved: they follow from the config, and may be
    others when the run goes on. A collective.
    """
    model_state, optimizer_state = get_state_dict(model, optimizers)
    kept = {"model": model_state, "optimizer": {"state": optimizer_state["state"]}}
    return kept, optimizer_state["param_groups"]


# ------------------------------------------------------------------ writing


def save(
    checkpoints: Path,
    model: nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    state: TrainState,
    config: TrainConfig,
    tokenizer: Tokenizer,
    world: World,
) -> dict[str, Any]:
    """Write the checkpoint of `state.step`. A collective.

    Returns what the event log should say of it: step, path, bytes, seconds. Raises AgreedError if
    a rank cannot write; earlier checkpoints stay as they are.
    """
    began = time.perf_counter()
    folder = inventory.step_folder(checkpoints, state.step)
    leads = world.rank == 0

    def prepare() -> None:
        if leads:
            inventory.sweep(checkpoints)
            folder.mkdir(parents=True, exist_ok=True)

    def write() -> dict[str, dict[str, Any]]:
        state_dict, _ = _state_dict(model, optimizers)
        dcp.save(
            state_dict,
            storage_writer=dcp.FileSystemWriter(folder, sync_files=True),
            process_group=world.control,
        )
        if leads:
            _write_companions(folder, config, tokenizer)
            _write_json(folder / "train_state.json", dataclasses.asdict(state))
        return {p.name: inventory.describe(p) for p in _own_files(folder, world.rank)}

    def complete() -> None:
        if leads:
            _complete(folder, listing, step=state.step)

    failure = f"checkpoint {folder} could not be written"
    world.together(prepare, failure)
    written = world.together(write, failure)
    listing = {name: entry for part in written for name, entry in part.items()}
    world.together(complete, failure)
    return {
        "step": state.step,
        "path": str(folder),
        "data_digest": state.data_digest,
        "bytes": sum(entry["bytes"] for entry in listing.values()),
        "seconds": round(time.perf_counter() - began, 3),
    }


def save_model(folder: Path, model: nn.Module, config: TrainConfig, tokenizer: Tokenizer) -> None:
    """Write a checkpoint of a plain (not sharded) model alone. In one process.

    config: resolved, `config.model` the model's; tokenizer: the one it is to be used with.
    `folder` must not exist, or be empty; it appears when it is complete. Raises RunFailedError
    where it cannot be written.
    """
    with new_folder(folder) as temporary:
        with _without_group():
            writer = dcp.FileSystemWriter(temporary, sync_files=True)
            dcp.save({"model": model.state_dict()}, storage_writer=writer, no_dist=True)
        _write_companions(temporary, config, tokenizer)
        _complete(temporary, {p.name: inventory.describe(p) for p in temporary.iterdir()})


def portable_config(config: TrainConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    """`config` as stored with a model, its tokenizer's file being `TOKENIZER_FILE` beside it."""
    values = to_dict(config)
    path = config.data.tokenizer.path if tokenizer.file is None else TOKENIZER_FILE
    values["data"]["tokenizer"] = {"name": tokenizer.name, "path": path}
    return values


def _write_companions(folder: Path, config: TrainConfig, tokenizer: Tokenizer) -> None:
    if tokenizer.file is not None:
        shutil.copyfile(tokenizer.file, folder / TOKENIZER_FILE)
    _write_json(folder / "params.json", portable_config(config, tokenizer))


def _write_json(path: Path, values: dict[str, Any]) -> None:
    with open(path, "w", encoding="utf-8") as file:
        json.dump(values, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def _complete(folder: Path, listing: dict[str, dict[str, Any]], **about: Any) -> None:
    text = json.dumps({**about, "files": listing}, indent=1, sort_keys=True)
    write_text_atomic(folder / inventory.COMPLETE, text)


def _own_files(folder: Path, rank: int) -> list[Path]:
    """The files of this folder that `rank` wrote; rank 0 also those that all share."""
    mine = [p for p in folder.iterdir() if p.name.startswith(f"__{rank}_")]
    if rank == 0:
        mine += [
            p
            for p in folder.iterdir()
            if not p.name.startswith("__") and p.name != inventory.COMPLETE
        ]
    return mine


# ------------------------------------------------------------------ reading


def read_state(folder: Path) -> TrainState:
    """The train state of a checkpoint."""
    return TrainState(**json.loads((folder / "train_state.json").read_text()))


def load(
    folder: Path, model: nn.Module, optimizers: Sequence[torch.optim.Optimizer], world: World
) -> TrainState:
    """Verify a checkpoint and load model and optimizers from it, in place. A collective.

    The checkpoint may come from any number of ranks. Raises AgreedError if it is damaged.
    """
    failure = f"checkpoint {folder} cannot be used"
    world.together(lambda: inventory.verify(folder, world.rank, world.size), failure)

    def read() -> TrainState:
        state, groups = _state_dict(model, optimizers)
        dcp.load(state, checkpoint_id=folder, process_group=world.control)
        set_state_dict(
            model,
            optimizers,
            model_state_dict=state["model"],
            optim_state_dict={**state["optimizer"], "param_groups": groups},
        )
        return read_state(folder)

    return world.together(read, failure)[0]


def load_model(folder: Path, model: nn.Module, world: World) -> set[str]:
    """Verify a checkpoint and load its weights into `model`, sharded or plain. A collective.

    Parameters below `aggs.` and `columns.` that the checkpoint lacks stay as they are; their names
    are returned. Sites that its model never ran (it saw one chunk) count as absent. Raises
    AgreedError if it is damaged, lacks another parameter, or holds one without a place in `model`.
    """
    failure = f"the weights of {folder} cannot be used"
    world.together(lambda: inventory.verify(folder, world.rank, world.size), failure)

    def read() -> set[str]:
        state = cast("dict[str, Tensor]", get_model_state_dict(model))
        kept = _missing(folder, {name: tuple(t.shape) for name, t in state.items()})
        shared = {name: tensor for name, tensor in state.items() if name not in kept}
        dcp.load({"model": shared}, checkpoint_id=folder, process_group=world.control)
        options = StateDictOptions(strict=False)
        set_model_state_dict(model, cast("dict[str, Any]", shared), options=options)
        if world.rank == 0:
            parts = sorted({".".join(name.split(".")[:2]) for name in kept})
            new = f"; new, not in it: {', '.join(parts)}" if parts else ""
            log.info("weights of %s%s", folder, new)
        return kept

    return world.together(read, failure)[0]


def stored_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Name and shape of each tensor of a checkpoint's model; reads none of them."""
    stored = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    return {
        name.removeprefix("model."): tuple(entry.size)
        for name, entry in stored.items()
        if name.startswith("model.") and isinstance(entry, TensorStorageMetadata)
    }


def _missing(folder: Path, wanted: dict[str, tuple[int, ...]]) -> set[str]:
    """The names in `wanted` that the checkpoint does not fill. Raises CheckpointError."""
    stored = stored_shapes(folder)
    saved = read_config(folder)
    if has_one_chunk(saved.model, saved.data.seq_len):
        stored = {name: shape for name, shape in stored.items() if not name.startswith("aggs.")}
    for name, shape in stored.items():
        if wanted.get(name, shape) != shape:
            raise CheckpointError(
                f"tensor {name} has the shape {list(shape)} there, {list(wanted[name])} here; "
                f"{_remedy(name, saved)}"
            )
        if name not in wanted:
            raise CheckpointError(f"tensor {name} has no place here; {_remedy(name, saved)}")
    missing = wanted.keys() - stored.keys()
    has_sites = any(name.startswith("aggs.") for name in stored)
    for name in sorted(missing):
        if not name.startswith(_ADDED) or (has_sites and name.startswith("aggs.")):
            raise CheckpointError(f"tensor {name} is missing there; {_remedy(name, saved)}")
    return missing


def _remedy(name: str, saved: TrainConfig) -> str:
    m = saved.model
    if name.startswith("aggs."):
        return (
            f"set model.module_agg={m.module_agg}, model.module_n_layers={m.module_n_layers} "
            f"and model.module_agg_dim={m.module_agg_dim}, as the checkpoint has them"
        )
    if name.startswith("columns."):
        return f"name the column {name.split('.')[1]} in model.module_names"
    return "set the keys of model.* as in the checkpoint's params.json"


def load_for_inference(
    path: str, device: torch.device | None = None
) -> tuple[LanguageModel, Tokenizer, TrainConfig, Path]:
    """The model (fp32, eval mode), tokenizer and config of the checkpoint that `path` names.

    On a GPU if there is one and `device` is not given. Works in one process without a process
    group. Raises CheckpointError.
    """
    folder = inventory.find(path)
    inventory.verify(folder)
    config = read_config(folder)
    tokenizer = build_tokenizer(config.data.tokenizer)
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with torch.device("meta"):
        model = LanguageModel(config.model)
    model.to_empty(device=device)
    state = {"model": model.state_dict()}
    with _without_group():
        dcp.load(state, checkpoint_id=folder, no_dist=True)
    model.load_state_dict(state["model"])
    return model.eval(), tokenizer, config, folder


@contextlib.contextmanager
def _without_group() -> Iterator[None]:
    """For torch.distributed.checkpoint in one process: its failures are raised as they happened."""
    with warnings.catch_warnings():
        # That there is no process group is meant.
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        try:
            yield
        except CheckpointException as error:
            cause, _ = next(iter(error.failures.values()))
            # Its own cause stays in sight: it may be a full disk.
            raise cause from (cause.__cause__ or cause.__context__ or error)
