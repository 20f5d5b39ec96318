"""The few files that a job needs on the shared file system, and the proof that it is shared.

They lie in `<dump_dir>/ray/slurm/<job>-<restarts>/` and go when the job's processes go: a secret
that every node must be able to read (Ray's token, and the key of the wire between the allocation
and its nodes), and a word from each node that the first must be able to read.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import time
from pathlib import Path

from modular_lm.errors import ConfigError
from modular_lm.files import writing

# NFS may take that long to show what another machine has written.
_PATIENCE_S = 30.0


class SharedFiles:
    """The folder of one start of a job."""

    def __init__(self, dump_dir: str | Path, attempt: str) -> None:
        self.folder = Path(dump_dir) / "ray" / "slurm" / attempt

    def create(self) -> None:
        """Make the folder and what the first node writes. Raises RunFailedError.

        Earlier starts of the same job, whose processes are gone for sure, leave nothing here.
        """
        with writing(self.folder):
            for old in self.folder.parent.glob(f"{self.folder.name.rpartition('-')[0]}-*"):
                shutil.rmtree(old)
            self.folder.mkdir(parents=True, mode=0o700)
            descriptor = os.open(self.token, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "w") as file:
                file.write(secrets.token_hex(32))

    def remove(self) -> None:
        """The folder is gone."""
        shutil.rmtree(self.folder, ignore_errors=True)

    @property
    def token(self) -> Path:
        """64 hexadecimal digits, for this user's eyes only."""
        return self.folder / "token"

    @property
    def secret(self) -> bytes:
        """The key of the wire."""
        return self.token.read_bytes()

    def answer(self, node: str) -> str:
        """On a node: write a new word for the first node to read; returns it."""
        word = secrets.token_hex(16)
        (self.folder / f"word-{node}").write_text(word)
        return word

    def claim(self) -> bool:
        """On a node: whether this is the first one to ask, after a start that did not end in order.

        One that did has removed the folder.
        """
        try:
            (self.folder / "claimed").touch(exist_ok=False)
        except OSError:
            return False
        return True

    def check_answer(self, node: str, word: str) -> None:
        """On the first node: raise ConfigError unless what `node` wrote arrives."""
        deadline = time.monotonic() + _PATIENCE_S
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError):
                if (self.folder / f"word-{node}").read_text() == word:
                    return
            time.sleep(0.2)
        raise ConfigError(
            f"dump_dir: what {node} writes into {self.folder} does not arrive on the first node; "
            "dump_dir must be on a file system that all nodes share"
        )
