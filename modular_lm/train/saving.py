"""Writing checkpoints, on any number of ranks: training waits only for a copy to host memory.

A checkpoint's folder holds `.metadata` and `*.distcp` (torch.distributed.checkpoint: loadable by
any number of ranks), `params.json` (the resolved config), `train_state.json` (where training
stands), the tokenizer's file if it has one, so that a checkpoint can be moved on its own, and
`COMPLETE`. One of a model alone has neither optimizer nor `train_state.json`; a run can start from
it (or from the model of any other) but not continue it. Which checkpoints exist, and which are
kept, is decided in `inventory`.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import logging
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from modular_lm.config import TrainConfig, to_dict
from modular_lm.errors import AgreedError
from modular_lm.files import new_folder, sync
from modular_lm.parallel import World
from modular_lm.storage import Place, write_bytes, write_text
from modular_lm.tokenizer import Tokenizer
from modular_lm.train import inventory
from modular_lm.train.checkpoint import TrainState, state_of
from modular_lm.train.random_state import get_random_state
from modular_lm.train.saved_config import TOKENIZER_FILE
from modular_lm.train.tensor_files import write_tensors

log = logging.getLogger(__name__)

_PATIENCE = 300.0  # seconds


class Saver:
    """Writes the checkpoints of a run, one at a time. All methods but `written` are collectives.

    With `checkpoint.async_save` a thread writes what `save` has copied. Its collectives have a
    process group of their own: on one that training uses they would be taken for those of training.
    """

    def __init__(
        self, checkpoints: Place, config: TrainConfig, tokenizer: Tokenizer, world: World
    ) -> None:
        self._checkpoints = checkpoints
        self._config = config
        self._tokenizer = tokenizer
        group = dist.new_group(backend="gloo")
        self._world = dataclasses.replace(world, control=group)
        self._copy = HostCopy(pinned=world.device.type == "cuda")
        self._writing: threading.Thread | None = None
        self._outcome: dict[str, Any] | BaseException = {}
        self._blocked = 0.0

    @property
    def busy(self) -> bool:
        """Whether there is a save whose outcome was not collected yet: the same on all ranks."""
        return self._writing is not None

    @property
    def written(self) -> bool:
        """Whether this rank's part of that save has ended, well or not."""
        return self._writing is not None and not self._writing.is_alive()

    def save(
        self,
        model: nn.Module,
        optimizers: Sequence[torch.optim.Optimizer],
        state: TrainState,
        *,
        rolling: bool = False,
    ) -> None:
        """Begin the checkpoint of `state.step`; the save before must have been collected.

        rolling: only against the loss of work, and removed when there is a newer checkpoint.
        """
        assert not self.busy
        began = time.perf_counter()
        state_dict, _ = state_of(model, optimizers)
        tensors = {
            **state_dict,
            "random": {str(self._world.rank): get_random_state(self._world.device)},
        }
        blocking = not self._config.checkpoint.async_save
        if not blocking:
            tensors = self._copy(tensors)

        def work() -> None:
            try:
                if self._world.device.type == "cuda":
                    # A thread begins on device 0, and what DCP takes for the current stream is then
                    # one of another rank's device: it would not wait for copies from ours.
                    torch.cuda.set_device(self._world.device)
                saved = self._write(tensors, state, rolling)
                seconds = time.perf_counter() - began
                self._outcome = {**saved, "seconds": round(seconds, 3)}
            except BaseException as error:
                self._outcome = error

        self._writing = threading.Thread(target=work, name="checkpoint", daemon=True)
        self._writing.start()
        if blocking:
            self._writing.join()
        self._blocked = time.perf_counter() - began

    def collect(self) -> dict[str, Any]:
        """Wait for the save to end: what the event log should say of it.

        Raises AgreedError if a rank could not write; earlier checkpoints stay as they are.
        """
        assert self._writing is not None
        asked = time.perf_counter()
        self._writing.join()
        self._writing = None
        if isinstance(self._outcome, BaseException):
            raise self._outcome
        blocked = self._blocked + time.perf_counter() - asked
        return {**self._outcome, "seconds_blocked": round(blocked, 3)}

    def settle(self) -> None:
        """Wait for a save that is under way, however it ends: training has failed meanwhile.

        Not for ever, as it may be a lost machine that both wait for.
        """
        if self._writing is not None:
            self._writing.join(timeout=_PATIENCE)

    def _write(self, tensors: dict[str, Any], state: TrainState, rolling: bool) -> dict[str, Any]:
        folder = inventory.step_folder(self._checkpoints, state.step)
        leads = self._world.rank == 0
        failure = f"checkpoint {folder} could not be written"

        def prepare() -> None:
            if leads:
                inventory.sweep(self._checkpoints)
                inventory.remove(folder)
                folder.mkdir(parents=True, exist_ok=True)
                if isinstance(folder, Path):
                    sync(folder.parent)  # or a crash of the machine could lose it with COMPLETE

        def write() -> dict[str, dict[str, Any]]:
            written = write_tensors(folder, tensors, self._world.control)
            if leads:
                written |= write_companions(folder, self._config, self._tokenizer)
                written |= _write_json(folder / "train_state.json", dataclasses.asdict(state))
            return written

        def complete() -> list[int]:
            if not leads:
                return []
            about = {"step": state.step, **({"rolling": True} if rolling else {})}
            write_complete(folder, listing, **about)
            return inventory.retain(self._checkpoints, self._config.checkpoint)

        self._world.together(prepare, failure)
        try:
            parts = self._world.together(write, failure)
        except AgreedError:
            if leads:
                # It may be what fills the disk, and no use to anyone.
                with contextlib.suppress(OSError):
                    inventory.remove(folder)
            raise
        listing = {name: entry for part in parts for name, entry in part.items()}
        (removed, *_) = self._world.together(complete, failure)
        return {
            "step": state.step,
            "path": str(folder),
            "data_digest": state.data_digest,
            "bytes": sum(entry["bytes"] for entry in listing.values()),
            "removed": removed,
        }


class HostCopy:
    """Copies a nested state into host memory, which it keeps for the next copy.

    A real copy also where training is on the CPU: what is written later must not change meanwhile.
    """

    def __init__(self, pinned: bool) -> None:
        self._pinned = pinned
        self._buffers: dict[tuple[Any, ...], Tensor] = {}

    def __call__(self, state: dict[str, Any]) -> dict[str, Any]:
        """The copy, which holds until the next call."""
        copied = self._walk(state, ())
        if self._pinned:
            torch.cuda.synchronize()
        return copied

    def _walk(self, value: Any, path: tuple[Any, ...]) -> Any:
        if isinstance(value, dict):
            return {key: self._walk(inner, (*path, key)) for key, inner in value.items()}
        if isinstance(value, DTensor):
            local = self._tensor(value.to_local(), path)
            return DTensor(local, value._spec, requires_grad=False)
        if isinstance(value, Tensor):
            return self._tensor(value, path)
        return copy.deepcopy(value)

    def _tensor(self, tensor: Tensor, path: tuple[Any, ...]) -> Tensor:
        buffer = self._buffers.get(path)
        if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
            # Pinning nothing fails.
            pinned = self._pinned and tensor.numel() > 0
            buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=pinned)
            self._buffers[path] = buffer
        buffer.copy_(tensor.detach(), non_blocking=self._pinned)
        return buffer


def save_model(folder: Path, model: nn.Module, config: TrainConfig, tokenizer: Tokenizer) -> None:
    """Write a checkpoint of a plain (not sharded) model alone. In one process.

    config: resolved, `config.model` the model's; tokenizer: the one it is to be used with.
    `folder` must not exist, or be empty; it appears when it is complete. Raises RunFailedError
    where it cannot be written.
    """
    with new_folder(folder) as temporary:
        listing = write_tensors(temporary, {"model": model.state_dict()})
        listing |= write_companions(temporary, config, tokenizer)
        write_complete(temporary, listing)


def portable_config(config: TrainConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    """`config` as stored with a model, its tokenizer's file being `TOKENIZER_FILE` beside it."""
    values = to_dict(config)
    path = config.data.tokenizer.path if tokenizer.file is None else TOKENIZER_FILE
    values["data"]["tokenizer"] = {"name": tokenizer.name, "path": path}
    return values


def write_companions(
    folder: Place, config: TrainConfig, tokenizer: Tokenizer
) -> dict[str, dict[str, Any]]:
    """Write `params.json` and the tokenizer's file; returns their sizes and checksums."""
    written = _write_json(folder / "params.json", portable_config(config, tokenizer))
    if tokenizer.file is not None:
        target = folder / TOKENIZER_FILE
        write_bytes(target, tokenizer.file.read_bytes())
        written[TOKENIZER_FILE] = inventory.describe(target)
    return written


def _write_json(file: Place, values: dict[str, Any]) -> dict[str, dict[str, Any]]:
    write_text(file, json.dumps(values, indent=1))
    return {file.name: inventory.describe(file)}


def write_complete(folder: Place, listing: dict[str, dict[str, Any]], **about: Any) -> None:
    """What makes a checkpoint of a folder, once all files of `listing` are in it."""
    text = json.dumps({**about, "files": listing}, indent=1, sort_keys=True)
    write_text(folder / inventory.COMPLETE, text)
