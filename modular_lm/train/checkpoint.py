"""Loading checkpoints, on any number of ranks: with all that training needs to go on, or the model
alone.

How they are written is in `saving`, which of them exist, and when one is whole, in `inventory`;
weights that other projects have saved are read in `initial`.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)

from modular_lm.config import ModelConfig, TrainConfig
from modular_lm.config.checks import has_one_chunk
from modular_lm.errors import CheckpointError
from modular_lm.model.lm import LanguageModel
from modular_lm.parallel import World
from modular_lm.storage import Place
from modular_lm.tokenizer import Tokenizer, build_tokenizer
from modular_lm.train import inventory
from modular_lm.train.random_state import set_random_state
from modular_lm.train.saved_config import model_differences, read_config
from modular_lm.train.tensor_files import read_index, read_tensors

log = logging.getLogger(__name__)
T = TypeVar("T")

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


def state_of(
    model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]
) -> tuple[dict[str, Any], Any]:
    """What is saved of a training: the weights, and by their names what optimizers keep of each.

    Beside it the parameter groups, which are not saved: they follow from the config, and may be
    others when the run goes on. A collective.
    """
    model_state, optimizer_state = get_state_dict(model, optimizers)
    kept = {"model": model_state, "optimizer": {"state": optimizer_state["state"]}}
    return kept, optimizer_state["param_groups"]


def read_state(folder: Place) -> TrainState:
    """The train state of a checkpoint. Raises CheckpointError, naming the file."""
    file = folder / "train_state.json"
    try:
        return TrainState(**json.loads(file.read_text()))
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{folder}: is a checkpoint of a model alone, which training cannot continue; start a "
            "new run with checkpoint.init_ckpt_path"
        ) from error
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{file}: not a train state: {error}") from error


def load(
    folder: Place, model: LanguageModel, optimizers: Sequence[torch.optim.Optimizer], world: World
) -> TrainState:
    """Verify a checkpoint and load model, optimizers and random numbers from it. A collective.

    The checkpoint may come from any number of ranks; those beyond them keep their random numbers.
    Raises AgreedError if it is damaged, or is another model's or optimizer's.
    """
    failure = f"checkpoint {folder} cannot be used"

    def look() -> tuple[TrainState, dict[str, Any], TrainConfig]:
        return read_state(folder), read_index(folder), read_config(folder)

    train_state, index, saved = _verified(folder, look, world, failure)

    def read() -> None:
        state, groups = state_of(model, optimizers)
        _check_all_there(index, saved, state, model.config)
        if random := index.get(f"random.{world.rank}"):
            # As long as it was saved: on a GPU that has random numbers of its own, too.
            state["random"] = {str(world.rank): torch.empty(random.size, dtype=torch.uint8)}
        read_tensors(folder, state, world.control)
        set_state_dict(
            model,
            optimizers,
            model_state_dict=state["model"],
            optim_state_dict={**state["optimizer"], "param_groups": groups},
        )
        if "random" in state:
            set_random_state(state["random"][str(world.rank)], world.device)

    world.together(read, failure)
    return train_state


def _verified(folder: Place, look: Callable[[], T], world: World, failure: str) -> T:
    """Verify a checkpoint; what `look` finds in it. A collective.

    Apart from the reading of tensors: that is a collective itself, and a rank that failed before it
    would leave the others in it.
    """
    found: list[T] = []

    def verify() -> None:
        inventory.verify(folder, world.rank, world.size)
        found.append(look())

    world.together(verify, failure)
    return found[0]


def _check_all_there(
    index: dict[str, Any], saved: TrainConfig, state: dict[str, Any], config: ModelConfig
) -> None:
    """Raise CheckpointError, naming a key, for what is another model's or optimizer's."""
    weights = cast("dict[str, Tensor]", state["model"])
    differing = model_differences(saved, config)
    if saved.model.module_names != config.module_names:
        names = (",".join(m.module_names) or "none" for m in (saved.model, config))
        differing.append("model.module_names: {} there, {} here".format(*names))
    if differing:
        raise CheckpointError(
            f"its model is another one: {'; '.join(differing)}; set these keys as in its "
            "params.json"
        )
    wanted = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    for name in check_fit(_shapes_in(index), wanted, saved):
        raise CheckpointError(f"tensor {name} is missing there; {_remedy(name, saved)}")
    for name, moments in state["optimizer"]["state"].items():
        for moment in moments:
            if f"optimizer.state.{name}.{moment}" not in index:
                raise CheckpointError(
                    f"the optimizer's {moment} of {name} is missing there; set the keys of optim.* "
                    "as in the checkpoint's params.json"
                )


def load_model(folder: Place, model: nn.Module, world: World) -> set[str]:
    """Verify a checkpoint and load its weights into `model`, sharded or plain. A collective.

    Parameters below `aggs.` and `columns.` that the checkpoint lacks stay as they are; their names
    are returned. Sites that its model never ran (it saw one chunk) count as absent. Raises
    AgreedError if it is damaged, lacks another parameter, or holds one without a place in `model`.
    """
    failure = f"the weights of {folder} cannot be used"

    def look() -> tuple[dict[str, tuple[int, ...]], TrainConfig]:
        return stored_shapes(folder), read_config(folder)

    stored, saved = _verified(folder, look, world, failure)

    def read() -> set[str]:
        state = cast("dict[str, Tensor]", get_model_state_dict(model))
        wanted = {name: tuple(t.shape) for name, t in state.items()}
        kept = missing_in(stored, wanted, saved)
        shared = {name: tensor for name, tensor in state.items() if name not in kept}
        read_tensors(folder, {"model": shared}, world.control)
        options = StateDictOptions(strict=False)
        set_model_state_dict(model, cast("dict[str, Any]", shared), options=options)
        if world.rank == 0:
            log_weights(folder, kept)
        return kept

    return world.together(read, failure)[0]


def log_weights(source: Place, kept: set[str]) -> None:
    """Say where the weights of a new run come from, and what it has beyond them."""
    parts = sorted({".".join(name.split(".")[:2]) for name in kept})
    new = f"; new, not in it: {', '.join(parts)}" if parts else ""
    log.info("weights of %s%s", source, new)


def stored_shapes(folder: Place) -> dict[str, tuple[int, ...]]:
    """Name and shape of each tensor of a checkpoint's model; reads none of them."""
    return _shapes_in(read_index(folder))


def _shapes_in(index: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    return {
        name.removeprefix("model."): tuple(entry.size)
        for name, entry in index.items()
        if name.startswith("model.") and isinstance(entry, TensorStorageMetadata)
    }


def missing_in(
    stored: dict[str, tuple[int, ...]], wanted: dict[str, tuple[int, ...]], saved: TrainConfig
) -> set[str]:
    """The names in `wanted` that weights of `saved` do not fill, and need not: sites and columns.

    Raises CheckpointError if they are weights of another model.
    """
    if has_one_chunk(saved.model, saved.data.seq_len):
        # Never trained, so not taken over.
        stored = {name: shape for name, shape in stored.items() if not name.startswith("aggs.")}
    missing = check_fit(stored, wanted, saved)
    has_sites = any(name.startswith("aggs.") for name in stored)
    for name in sorted(missing):
        if not name.startswith(_ADDED) or (has_sites and name.startswith("aggs.")):
            raise CheckpointError(f"tensor {name} is missing there; {_remedy(name, saved)}")
    return missing


def check_fit(
    stored: dict[str, tuple[int, ...]], wanted: dict[str, tuple[int, ...]], saved: TrainConfig
) -> set[str]:
    """The names in `wanted` that `stored` lacks.

    Raises CheckpointError for a tensor of another shape, or without a place in `wanted`.
    """
    for name, shape in stored.items():
        if wanted.get(name, shape) != shape:
            raise CheckpointError(
                f"tensor {name} has the shape {list(shape)} there, {list(wanted[name])} here; "
                f"{_remedy(name, saved)}"
            )
        if name not in wanted:
            raise CheckpointError(f"tensor {name} has no place here; {_remedy(name, saved)}")
    return wanted.keys() - stored.keys()


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
) -> tuple[LanguageModel, Tokenizer, TrainConfig, Place]:
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
    read_tensors(folder, state)
    model.load_state_dict(state["model"])
    return model.eval(), tokenizer, config, folder
