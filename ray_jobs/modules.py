"""The named columns of a checkpoint: list, add, export, import and merge them.

action=list    show the columns, their parameters and hashes
action=add     name= init=copy|fresh dst=: a new column, not trained yet
action=export  name= out=FILE.pt: one column as a file
action=import  src=FILE.pt dst= [name=]: add the column of a file; its base must be the same
action=merge   modules=a,b name= dst=: add the mean of columns, `base` allowed among them

ckpt= is never changed; dst= is a new checkpoint folder, without optimizer. To add a column and
train it, run ray_jobs.train with model.create_module_name. One process, without Ray.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from modular_lm.cli import run_job
from modular_lm.config import ModulesConfig
from modular_lm.config.columns import check_new_column
from modular_lm.config.schema import ModulesAction
from modular_lm.errors import EXIT_DONE, ConfigError
from modular_lm.files import check_new
from modular_lm.model.sizes import BASE, column_names
from modular_lm.train.inventory import find
from modular_lm.train.saved_config import read_config

if TYPE_CHECKING:
    from modular_lm.model.lm import LanguageModel

USAGE = "python -m ray_jobs.modules action=list ckpt=DIR"
# Action -> the keys that it needs, the keys that it also takes.
_KEYS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "list": ((), ()),
    "add": (("name", "dst"), ("init",)),
    "export": (("name", "out"), ()),
    "import": (("src", "dst"), ("name",)),
    "merge": (("modules", "name", "dst"), ()),
}


def main(config: ModulesConfig, given: dict[str, Any]) -> int:
    """The job; returns the exit code."""
    _check_keys(config, given)
    folder = find(config.ckpt).resolve()
    _check_names(config, column_names(read_config(folder).model))  # before torch is loaded
    from modular_lm.train.checkpoint import load_for_inference
    from modular_lm.train.saving import save_model

    model, tokenizer, saved, _ = load_for_inference(str(folder), _cpu())
    if config.action == "list":
        print(_table(model), flush=True)
    elif config.action == "export":
        _export(config, model)
    else:
        grown = _grow(config, model, saved.seed)
        saved.model = grown.config
        save_model(Path(config.dst).expanduser().absolute(), grown, saved, tokenizer)
        print(f"{config.dst}: columns {', '.join(grown.column_names)}", flush=True)
    return EXIT_DONE


def _check_keys(config: ModulesConfig, given: dict[str, Any]) -> None:
    """Raise ConfigError for keys that the action lacks or does not take, and for taken paths."""
    action = config.action
    if action is None:
        raise ConfigError(f"action=null: expected one of {', '.join(get_args(ModulesAction))}")
    needed, taken = _KEYS[action]
    for key in needed:
        if not getattr(config, key):
            raise ConfigError(f"{key}=: action={action} needs it")
    for key in given:
        if key not in ("action", "ckpt", *needed, *taken):
            keys = ", ".join(("ckpt", *needed, *taken))
            raise ConfigError(f"{key}: action={action} does not take it, only {keys}")
    if config.dst:
        check_new(Path(config.dst).expanduser().absolute(), "dst")
    if config.out and Path(config.out).expanduser().exists():
        raise ConfigError(f"out={config.out}: is there already; choose a new file")
    if config.src and not Path(config.src).expanduser().is_file():
        raise ConfigError(f"src={config.src}: no such file")


def _check_names(config: ModulesConfig, names: tuple[str, ...]) -> None:
    """Raise ConfigError for names that a model with these columns has, or lacks."""
    if config.action == "export" and config.name not in names[1:]:
        others = ", ".join(names[1:]) or "there is none"
        raise ConfigError(f"name={config.name}: expected a column beside the base: {others}")
    if config.action in ("add", "merge"):
        check_new_column(config.name, names, "name")
    if config.action != "merge":
        return
    unknown = [name for name in config.modules if name not in names]
    if unknown or len(set(config.modules)) != len(config.modules) or len(config.modules) < 2:
        raise ConfigError(
            f"modules={','.join(config.modules)}: expected two or more different columns of "
            f"{', '.join(names)}"
        )


def _cpu() -> Any:
    import torch

    return torch.device("cpu")


def _export(config: ModulesConfig, model: LanguageModel) -> None:
    from modular_lm.train.column_file import DIGITS, base_hash, write_column

    write_column(model, config.name, Path(config.out).expanduser())
    print(f"{config.out}: column {config.name} of the base {base_hash(model)[:DIGITS]}", flush=True)


def _grow(config: ModulesConfig, model: LanguageModel, seed: int) -> LanguageModel:
    """The model with its new column. Raises CheckpointError or ConfigError for an import."""
    from modular_lm.model.columns import begin_column
    from modular_lm.model.growth import fill_column, mean_of, with_column
    from modular_lm.train.column_file import read_column

    if config.action == "add":
        grown = with_column(model, config.name, seed)
        begin_column(grown, config.name, config.init)
        return grown
    if config.action == "merge":
        name, weights = config.name, mean_of(model, config.modules)
    else:
        column = read_column(Path(config.src).expanduser(), model)
        name, weights = config.name or column.name, column.weights
        check_new_column(name, model.column_names, "name")
    grown = with_column(model, name, seed)
    fill_column(grown, name, weights)
    return grown


def _table(model: LanguageModel) -> str:
    from modular_lm.model.columns import layers_of
    from modular_lm.train.column_file import DIGITS, base_hash, column_hash

    width = max(len("column"), *map(len, model.column_names))
    lines = [f"{'column':<{width}}  {'parameters':>14}  weights"]
    for name in model.column_names:
        count = sum(p.numel() for p in layers_of(model, name).parameters())
        lines.append(f"{name:<{width}}  {count:>14,}  {column_hash(model, name)[:DIGITS]}")
    shared = base_hash(model)[:DIGITS]
    lines.append(f"base {shared}: what all columns share and the layers of {BASE}")
    return "\n".join(lines)


if __name__ == "__main__":
    run_job(ModulesConfig, main, what=__doc__ or "", usage=USAGE)
