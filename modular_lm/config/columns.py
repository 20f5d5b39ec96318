"""Named columns in the config: which names they can have, and what follows from their keys.

What a column is, is said in `modular_lm.model.columns`. Imports no torch.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

from modular_lm.config.schema import ModelConfig
from modular_lm.errors import ConfigError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
# Two words of the jobs, and the attributes of torch.nn.ModuleDict, whose keys columns are.
_TAKEN = re.findall(
    r"\w+",
    """
    auto base
    T_destination add_module apply bfloat16 buffers call_super_init children clear compile cpu cuda
    double dump_patches eval extra_repr float forward get_buffer get_extra_state get_parameter
    get_submodule half ipu items keys load_state_dict modules mtia named_buffers named_children
    named_modules named_parameters parameters pop register_backward_hook register_buffer
    register_forward_hook register_forward_pre_hook register_full_backward_hook
    register_full_backward_pre_hook register_load_state_dict_post_hook
    register_load_state_dict_pre_hook register_module register_parameter
    register_state_dict_post_hook register_state_dict_pre_hook requires_grad_ set_extra_state
    set_submodule share_memory state_dict to to_empty train training type update values xpu
    zero_grad
    """,
)


def resolve_columns(m: ModelConfig) -> ModelConfig:
    """With the new column among the names, and the route and what is trained filled in.

    Raises ConfigError for names that no column can have and for routes that do not exist.
    """
    new, names = m.create_module_name, list(m.module_names)
    if new is not None and new not in names:
        names.append(new)
    for i, name in enumerate(names):
        key = "create_module_name" if name == new else "module_names"
        check_new_column(name, names[:i], f"model.{key}")
    route = m.module_route or new or "base"
    if route == "auto":
        raise ConfigError(
            "model.module_route=auto: training runs all chunks through one column; name it, and "
            "route by evidence (route=auto) when generating"
        )
    if route not in ("base", *names):
        raise ConfigError(
            f"model.module_route={route}: expected a column: {', '.join(['base', *names])}"
        )
    if new is not None and route != new:
        raise ConfigError(
            f"model.module_route={route}: the new column is trained, "
            f"model.create_module_name={new}; leave the route out"
        )
    train = m.module_train or ("all" if route == "base" else "new")
    return dataclasses.replace(m, module_names=names, module_route=route, module_train=train)


def check_new_column(name: str, taken: Sequence[str], key: str) -> None:
    """Raise ConfigError, naming `key`, unless a column can be called so beside those in `taken`."""
    if name in taken:
        raise ConfigError(
            f"{key}={name}: there is such a column already, of {', '.join(taken)}; choose another "
            "name"
        )
    if name in _TAKEN:
        raise ConfigError(f"{key}={name}: PyTorch or the jobs use this word; choose another")
    if not _NAME.fullmatch(name):
        raise ConfigError(f"{key}={name}: expected a name of letters, digits, - and _")
