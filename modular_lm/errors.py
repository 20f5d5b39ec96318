"""Errors whose message is written for the user, and the exit code each stands for.

`modular_lm.cli.run_job` prints the message of these on one line and exits with `exit_code`; any
other exception is a bug of ours and keeps its traceback.
"""

from __future__ import annotations

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_BAD_INPUT = 2
EXIT_STOPPED = 3


class UserFacingError(Exception):
    """Base of all errors that are shown as one line, without a traceback."""

    exit_code = EXIT_FAILED


class RunFailedError(UserFacingError):
    """A job started correctly and then failed (dead workers, lost server)."""


class FullDiskError(RunFailedError):
    """A full disk or a spent quota: whoever tries again at once meets it again."""


class ConfigError(UserFacingError):
    """A configuration that cannot run: names the key, the value, and what was expected."""

    exit_code = EXIT_BAD_INPUT


class DataError(UserFacingError):
    """Input that cannot be used: names the file (and line or row), and what was expected."""

    exit_code = EXIT_BAD_INPUT


class CheckpointError(UserFacingError):
    """A checkpoint that is missing, incomplete, damaged or of another model."""

    exit_code = EXIT_BAD_INPUT


class AgreedError(UserFacingError):
    """A failure that all ranks know of and raise at the same place: none waits for another."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message, exit_code)
        self.exit_code = exit_code

    def __str__(self) -> str:
        return str(self.args[0])


class DivergedError(AgreedError):
    """Training that went wrong by itself: from the same checkpoint it would do so again."""


def reason(error: BaseException) -> str:
    """What an exception says, on one line of bounded length."""
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    else:
        text = str(error) or type(error).__name__
    return " ".join(text.split())[:500]
