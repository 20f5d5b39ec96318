"""A run: one `dump_dir` across all of its attempts, whoever starts them.

`open_run` checks a config against the data and against what the folder already holds, before
anything is written; `Run.begin` writes what describes the run; `Run.begin_attempt` decides from
which step an attempt goes on. Ray (`ray_jobs.train`) and torchrun (`python -m modular_lm.train`)
differ only in who calls these. Imports no torch, so that a mistake is answered at once; what each
rank does is in `worker`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from modular_lm.config import TrainConfig, to_dict, to_yaml
from modular_lm.config.checks import (
    changes,
    dump_dir_of,
    global_batch_size,
    has_one_chunk,
    resolve,
    warnings_of,
)
from modular_lm.config.distributed import mesh_sizes
from modular_lm.config.load import from_dict
from modular_lm.data.dataset import Dataset
from modular_lm.data.fingerprint import differences
from modular_lm.errors import ConfigError, DataError, UserFacingError, reason
from modular_lm.files import write_text_atomic
from modular_lm.storage import Place, check_writable, place
from modular_lm.tokenizer import Tokenizer, build_tokenizer
from modular_lm.tracking.run_folder import RunFolder
from modular_lm.tracking.snapshot import snapshot_code
from modular_lm.train.attempts import end_attempt
from modular_lm.train.inventory import checkpoints_of, complete_steps, newest_step, step_folder
from modular_lm.train.ownership import check_moved, check_owner, claim
from modular_lm.train.saved_config import (
    INIT_KEY,
    absolute_initial,
    find_initial,
    initial_config,
    read_config,
)

log = logging.getLogger(__name__)


def resolve_config(config: TrainConfig) -> tuple[TrainConfig, Tokenizer]:
    """Fill in all defaults, make paths absolute, and build the tokenizer.

    Raises ConfigError, or CheckpointError where a new run cannot start from
    `checkpoint.init_ckpt_path`.
    """
    tokenizer = build_tokenizer(config.data.tokenizer)
    resolved = resolve(_inherited(config), tokenizer.n_words)
    token = resolved.data.tokenizer
    if tokenizer.file is not None:
        token = dataclasses.replace(token, path=str(tokenizer.file.resolve()))
    root = resolved.data.root_dir
    data = dataclasses.replace(
        resolved.data, tokenizer=token, root_dir=root and str(Path(root).expanduser().resolve())
    )
    assert resolved.dump_dir is not None
    if "://" in resolved.dump_dir:
        raise ConfigError(
            f"dump_dir={resolved.dump_dir}: must be a folder that all nodes share, not a URI"
        )
    dump_dir = str(Path(resolved.dump_dir).expanduser().resolve())
    checkpoint = resolved.checkpoint
    if checkpoint.path is not None:
        where = str(place(checkpoint.path).resolve())
        checkpoint = dataclasses.replace(checkpoint, path=where)
    resolved = dataclasses.replace(resolved, data=data, dump_dir=dump_dir, checkpoint=checkpoint)
    _check_names(resolved)
    return _with_initial_weights(resolved, tokenizer), tokenizer


def _check_names(config: TrainConfig) -> None:
    """Raise ConfigError for keys that name parts of the model, or operators, of which none is
    there."""
    c = config.distributed
    if c.activation_checkpointing == "selective":
        from modular_lm.parallel.recompute import saved_operators

        saved_operators(c)
    if not config.optim.lr_multipliers and c.float8_recipe is None:
        return
    import torch

    from modular_lm.model.lm import LanguageModel
    from modular_lm.optim.groups import check_patterns
    from modular_lm.parallel.float8 import check_filter

    with torch.device("meta"):
        model = LanguageModel(config.model)
    check_patterns(config.optim, [name for name, _ in model.named_parameters()])
    if c.float8_recipe is not None:
        check_filter(model, c.float8_filter)


def _inherited(config: TrainConfig) -> TrainConfig:
    """`module_names` and, where it is not given, `module_sum_scale`, which weights are trained for:
    as the run's own checkpoints have them, else as the initial one has."""
    initial, model = config.checkpoint.init_ckpt_path, config.model
    checkpoints = checkpoints_of(config.checkpoint, Path(dump_dir_of(config)).expanduser())
    if step := newest_step(checkpoints):
        own = read_config(step_folder(checkpoints, step)).model
        # Others than these are refused with all else that a run may not change.
        model = dataclasses.replace(
            model,
            module_names=model.module_names or own.module_names,
            module_sum_scale=model.module_sum_scale or own.module_sum_scale,
        )
        return dataclasses.replace(config, model=model)
    names, scale, new = [], model.module_sum_scale, model.create_module_name
    if initial is not None:
        saved = initial_config(initial)
        names = saved.model.module_names
        trained = not has_one_chunk(saved.model, saved.data.seq_len)
        if scale is None and saved.model.module_agg == "sum" and trained:
            scale = saved.model.module_sum_scale
    if new in names:
        raise ConfigError(
            f"model.create_module_name={new}: {INIT_KEY}={initial} has this column already; "
            f"choose another name, or train it further with model.module_route={new} instead"
        )
    if model.module_names not in ([], names, [*names, new]):
        raise ConfigError(
            f"model.module_names={','.join(model.module_names)}: a new run has the columns of "
            f"{INIT_KEY}={initial} ({', '.join(names) or 'none'}); leave this key out"
        )
    model = dataclasses.replace(model, module_names=names, module_sum_scale=scale)
    return dataclasses.replace(config, model=model)


def _with_initial_weights(config: TrainConfig, tokenizer: Tokenizer) -> TrainConfig:
    """`checkpoint.init_ckpt_path` as the very checkpoint: a run's folder stands for its latest.

    Checked for a new run only: one with checkpoints of its own needs it no more, it may be gone.
    """
    path = config.checkpoint.init_ckpt_path
    if path is None:
        return config
    assert config.dump_dir is not None
    if newest_step(checkpoints_of(config.checkpoint, Path(config.dump_dir))) == 0:
        found = find_initial(config, tokenizer)
    else:
        found = place(path).resolve()
        with contextlib.suppress(UserFacingError):
            found = absolute_initial(path)
    checkpoint = dataclasses.replace(config.checkpoint, init_ckpt_path=str(found))
    return dataclasses.replace(config, checkpoint=checkpoint)


@dataclass
class Run:
    """What all attempts and all ranks of a run share; picklable.

    global_batch_size: samples per optimizer step, fixed when the run first started.
    stop_step: where this command ends: `stop_at`, else `steps`.
    """

    config: TrainConfig
    folder: RunFolder
    tokenizer: Tokenizer
    dataset: Dataset
    global_batch_size: int
    stop_step: int
    config_changes: tuple[str, ...]
    data_changes: tuple[str, ...]
    is_new: bool

    @property
    def checkpoints(self) -> Place:
        return checkpoints_of(self.config.checkpoint, self.folder.path)

    @property
    def done_steps(self) -> int:
        return newest_step(self.checkpoints)

    @property
    def is_complete(self) -> bool:
        """The checkpoint of the last step is written after all else that belongs to it."""
        return self.done_steps >= self.stop_step

    def check_storage(self) -> None:
        """Raise ConfigError or RunFailedError if no checkpoint can be written there."""
        if not self.is_complete:
            check_writable(self.checkpoints, "checkpoint.path")

    def begin(self, given: dict[str, Any]) -> None:
        """Create the folder if need be and write what describes the run. Driver only."""
        self.folder.create()
        self.folder.clear_stop()
        end_attempt(self.folder, "lost", "its driver was killed")
        write_text_atomic(self.folder.config, to_yaml(to_dict(self.config)))
        write_text_atomic(self.folder.base_config, to_yaml(given))
        snapshot_code(self.folder.code)
        if self.is_new:
            # Lines of an earlier run that was given up before its first checkpoint.
            self.folder.metrics.cut_after(0)
            self.folder.eval_metrics.cut_after(0)
            self.folder.last_step.forget()
            self.folder.append_event(
                "created",
                uid=uuid.uuid4().hex,
                name=self.config.name,
                global_batch_size=self.global_batch_size,
                batch_size=self.config.data.batch_size,
                grad_acc_steps=self.config.grad_acc_steps,
                data=self.dataset.fingerprint(),
                init_ckpt_path=self.config.checkpoint.init_ckpt_path,
            )
        created = self.folder.last_event("created") or {}
        claim(self.checkpoints, created["uid"], self.folder.path)

    def begin_attempt(self, hosts: list[str], addresses: list[str] | None = None) -> int:
        """Pick the newest complete checkpoint, record the attempt, return its start step.

        hosts: the machine of every rank; addresses: with Ray, the node of every rank.
        """
        self.record_checkpoints()
        start = self.done_steps
        attempts = sum(1 for event in self.folder.events() if event["event"] == "attempt")
        self.folder.append_event(
            "attempt",
            attempt=attempts + 1,
            start_step=start,
            steps_again=max(0, self.folder.last_step.read() - start),
            world_size=len(hosts),
            hosts=sorted(set(hosts)),
            addresses=addresses,
            config_changes=list(self.config_changes),
            data_changes=list(self.data_changes),
            data=self.dataset.fingerprint(),
            init_ckpt_path=None if start else self.config.checkpoint.init_ckpt_path,
        )
        # Counted; the next attempt counts what this one does.
        self.folder.last_step.write(start)
        return start

    def record_checkpoints(self) -> None:
        """Add the events of checkpoints whose writer was killed before it could report them."""
        events = (e for e in self.folder.events() if e["event"] == "checkpoint")
        known = {event["step"] for event in events}
        for step in complete_steps(self.checkpoints):
            if step not in known:
                path = step_folder(self.checkpoints, step)
                self.folder.append_event("checkpoint", step=step, path=str(path))

    def describe_data(self, step: int) -> dict[str, float]:
        """Epoch and share of each source in the global batch that ended step `step`."""
        first = (step - 1) * self.global_batch_size
        where = self.dataset.plan.locate(range(first, first + self.global_batch_size))
        figures: dict[str, float] = {}
        for number, source in enumerate(self.dataset.plan.sources):
            mine = where.source == number
            figures[f"data/share/{source.name}"] = float(mine.mean())
            if mine.any():
                figures[f"data/epoch/{source.name}"] = int(where.epoch[mine].max())
        return figures


def open_run(config: TrainConfig, tokenizer: Tokenizer, world_size: int) -> Run:
    """The run that a resolved config describes, new or continued. Writes nothing to dump_dir.

    Raises ConfigError where the config contradicts what the folder holds, DataError or
    ConfigError where the data do not fit.
    """
    assert config.dump_dir is not None
    for warning in warnings_of(config):
        log.warning("%s", warning)
    folder = RunFolder(config.dump_dir)
    if folder.path.exists() and not folder.path.is_dir():
        raise ConfigError(f"dump_dir={folder.path}: is a file; choose a folder")
    created = folder.last_event("created")
    checkpoints = checkpoints_of(config.checkpoint, folder.path)
    if config.checkpoint.path is not None:
        check_owner(checkpoints, (created or {}).get("uid"), folder.path)
    # A config that cannot be read is the business of those who need it.
    with contextlib.suppress(_Unreadable, FileNotFoundError):
        stored = _stored_config(folder, tokenizer)
        check_moved(checkpoints, checkpoints_of(stored.checkpoint, folder.path))
    stop_step = config.stop_at or config.steps
    implied = global_batch_size(config, world_size)
    if created is None or newest_step(checkpoints) == 0:
        # Nothing was saved yet, so nothing can be contradicted.
        dataset = Dataset(config.data, tokenizer, implied)
        same = created is not None and _is_same_run(config, folder, dataset, implied, created)
        return Run(config, folder, tokenizer, dataset, implied, stop_step, (), (), not same)
    refused, allowed = changes(_stored_config(folder, tokenizer), config)
    if refused:
        raise ConfigError(
            f"dump_dir={folder.path}: holds a run whose {'; '.join(refused)}: these cannot change "
            "within a run; use another dump_dir (or name) for a new one"
        )
    batch = _stored_batch(config, created, implied, world_size)
    dataset = Dataset(config.data, tokenizer, batch)
    changed = _data_changes(config, folder, dataset)
    return Run(
        config, folder, tokenizer, dataset, batch, stop_step, tuple(allowed), changed, is_new=False
    )


def _data_changes(config: TrainConfig, folder: RunFolder, dataset: Dataset) -> tuple[str, ...]:
    """How the data differ from those that the run has seen so far.

    Raises DataError for a difference, unless `data.allow_change` is set.
    """
    newest = newest_step(checkpoints_of(config.checkpoint, folder.path))
    changed = differences(_data_seen(folder, newest), dataset.fingerprint(), newest)
    if changed and not config.data.allow_change:
        raise DataError(
            f"the data of this run have changed since it began: {'; '.join(changed)}; restore "
            "them, use another dump_dir for a new run, add data.stages to change weights from a "
            "later step on, or set data.allow_change=true to go on with other data"
        )
    return tuple(changed)


def _data_seen(folder: RunFolder, step: int) -> dict[str, str]:
    """The fingerprint of the data under which the checkpoint of `step` was made.

    An attempt under other data that saved nothing does not count.
    """
    latest: dict[str, str] = {}
    seen = None
    for event in folder.events():
        latest = event.get("data", latest)
        if event["event"] == "checkpoint" and event["step"] == step:
            seen = latest
    # Without an event: its writer was killed before it could report it.
    return latest if seen is None else seen


class _Unreadable(ConfigError):
    """The config of an earlier attempt is damaged, or another version's."""


def _stored_config(folder: RunFolder, tokenizer: Tokenizer) -> TrainConfig:
    """The config of the latest attempt; keys that are newer than it have their defaults."""
    try:
        values = yaml.safe_load(folder.config.read_text())
        return resolve(from_dict(TrainConfig, values), tokenizer.n_words)
    except (yaml.YAMLError, ConfigError) as error:
        raise _Unreadable(
            f"{folder.config}: {reason(error)}; the run cannot be continued"
        ) from error


def _is_same_run(
    config: TrainConfig,
    folder: RunFolder,
    dataset: Dataset,
    batch: int,
    created: dict[str, Any],
) -> bool:
    try:
        refused, _ = changes(_stored_config(folder, dataset.tokenizer), config)
    except (ConfigError, OSError):
        return False
    same_data = created["data"] == dataset.fingerprint()
    same_start = created.get("init_ckpt_path") == config.checkpoint.init_ckpt_path
    return not refused and same_data and same_start and created["global_batch_size"] == batch


def _stored_batch(
    config: TrainConfig, created: dict[str, Any], implied: int, world_size: int
) -> int:
    """The run's global batch; refuse a command that asks for another one."""
    stored = created["global_batch_size"]
    asked = {
        "data.batch_size": (created["batch_size"], config.data.batch_size),
        "grad_acc_steps": (created["grad_acc_steps"], config.grad_acc_steps),
    }
    changed = [f"{k}: {old} -> {new}" for k, (old, new) in asked.items() if old != new]
    if implied != stored and changed:
        raise ConfigError(
            f"{'; '.join(changed)}: with {world_size} workers these make {implied} samples a step, "
            f"but this run has {stored}; choose them so that their product with the number of "
            f"workers is {stored}, or leave them as they were (accumulation then follows)"
        )
    ranks = mesh_sizes(config.distributed, world_size).data
    if stored < ranks:
        raise ConfigError(
            f"ray.num_workers={world_size}: more data-parallel workers ({ranks}) than the {stored} "
            "samples of a step"
        )
    return stored
