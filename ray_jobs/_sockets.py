"""How long the path may be of the folder in which Ray makes its sessions, and their sockets."""

from __future__ import annotations

import os

# Bytes of the longest path of a socket. PIDs have up to seven digits, sockets a number.
_LIMIT = 107
_BELOW = "/session_2026-01-01_00-00-00_000000_1234567/sockets/plasma_store.1"
ROOM = _LIMIT - len(_BELOW)


def excess(folder: str | os.PathLike[str]) -> int:
    """By how many bytes the path of Ray's folder is too long; 0 if it is not."""
    return max(0, len(os.fsencode(folder)) - ROOM)
