"""Saving and loading a checkpoint: model, optimizer and train state, on any number of ranks.

Which checkpoints exist, and when one is whole, is decided in `inventory`. A checkpoint's folder
holds `.metadata` and `*.distcp` (torch.distributed.checkpoint: loadable by any number of ranks),
`params.json` (the resolved config), `train_state.json` (where training stands), the tokenizer's
file if it has one, so that a checkpoint can be moved on its own, and `COMPLETE`.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from modular_lm.config import TrainConfig, to_dict
from modular_lm.config.load import from_dict
from modular_lm.errors import CheckpointError, ConfigError
from modular_lm.files import write_text_atomic
from modular_lm.model.lm import LanguageModel
from modular_lm.parallel import World
from modular_lm.tokenizer import Tokenizer, build_tokenizer
from modular_lm.train import inventory

_TOKENIZER = "tokenizer.model"


@dataclass(frozen=True)
class TrainState:
    """Where training stands: `step` optimizer steps are done, of `global_batch_size` samples."""

    step: int
    global_batch_size: int
    tokens: int


# ------------------------------------------------------------------ writing


def save(
    checkpoints: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
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
        model_state, optimizer_state = get_state_dict(model, optimizer)
        dcp.save(
            {"model": model_state, "optimizer": optimizer_state},
            storage_writer=dcp.FileSystemWriter(folder, sync_files=True),
            process_group=world.control,
        )
        if leads:
            _write_companions(folder, state, config, tokenizer)
        return {p.name: inventory.describe(p) for p in _own_files(folder, world.rank)}

    def complete() -> None:
        if leads:
            text = json.dumps({"step": state.step, "files": listing}, indent=1, sort_keys=True)
            write_text_atomic(folder / inventory.COMPLETE, text)

    failure = f"checkpoint {folder} could not be written"
    world.together(prepare, failure)
    written = world.together(write, failure)
    listing = {name: entry for part in written for name, entry in part.items()}
    world.together(complete, failure)
    return {
        "step": state.step,
        "path": str(folder),
        "bytes": sum(entry["bytes"] for entry in listing.values()),
        "seconds": round(time.perf_counter() - began, 3),
    }


def _write_companions(
    folder: Path, state: TrainState, config: TrainConfig, tokenizer: Tokenizer
) -> None:
    values = to_dict(config)
    if tokenizer.file is not None:
        shutil.copyfile(tokenizer.file, folder / _TOKENIZER)
        values["data"]["tokenizer"]["path"] = _TOKENIZER
    (folder / "params.json").write_text(json.dumps(values, indent=1))
    (folder / "train_state.json").write_text(json.dumps(dataclasses.asdict(state), indent=1))
    for name in ("params.json", "train_state.json"):
        with open(folder / name, "rb") as file:
            os.fsync(file.fileno())


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
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, world: World
) -> TrainState:
    """Verify a checkpoint and load model and optimizer from it, in place. A collective.

    The checkpoint may come from any number of ranks. Raises AgreedError if it is damaged.
    """
    failure = f"checkpoint {folder} cannot be used"
    world.together(lambda: inventory.verify(folder, world.rank, world.size), failure)

    def read() -> TrainState:
        model_state, optimizer_state = get_state_dict(model, optimizer)
        state = {"model": model_state, "optimizer": optimizer_state}
        dcp.load(state, checkpoint_id=folder, process_group=world.control)
        set_state_dict(
            model,
            optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
        )
        return read_state(folder)

    return world.together(read, failure)[0]


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
    with warnings.catch_warnings():
        # That there is no process group is meant.
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.load(state, checkpoint_id=folder, no_dist=True)
    model.load_state_dict(state["model"])
    return model.eval(), tokenizer, config, folder


def read_config(folder: Path) -> TrainConfig:
    """The resolved config a checkpoint was written with, its tokenizer the one that lies in it."""
    try:
        config = from_dict(TrainConfig, json.loads((folder / "params.json").read_text()))
    except (ConfigError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{folder / 'params.json'}: {error}") from error
    tokenizer = config.data.tokenizer
    if tokenizer.path == _TOKENIZER:
        tokenizer.path = str(folder / _TOKENIZER)
    return config
