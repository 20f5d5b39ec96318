"""How a key of the configuration is declared."""

from __future__ import annotations

from dataclasses import field
from typing import Any


def key(
    default: Any,
    help: str,
    *,
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    lt: float | None = None,
    name: str | None = None,
) -> Any:
    """A dataclass field with a one-line description and inclusive (ge, le) or strict bounds.

    name: the key that users write, where the field cannot be called so (`from`).
    """
    metadata = {"help": help, "ge": ge, "gt": gt, "le": le, "lt": lt, "name": name}
    if isinstance(default, type):
        return field(default_factory=default, metadata=metadata)
    if isinstance(default, dict | list):
        return field(default_factory=lambda: default.copy(), metadata=metadata)
    return field(default=default, metadata=metadata)
