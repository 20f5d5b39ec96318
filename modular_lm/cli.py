"""What every command shares: arguments to config, `--help`, logging, errors to exit codes.

A job is a function of its config that returns an exit code; `run_job` is the only place that
turns exceptions into messages.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn, TextIO, TypeVar, cast

from modular_lm.config.load import format_help, load_config
from modular_lm.errors import EXIT_DONE, EXIT_FAILED, EXIT_STOPPED, UserFacingError
from modular_lm.submission import check_lasting

T = TypeVar("T")


def run_job(
    cls: type[T],
    job: Callable[[T, dict[str, Any]], int],
    *,
    what: str,
    usage: str,
    args: Sequence[str] | None = None,
) -> NoReturn:
    """Parse `args` (default: sys.argv) into `cls`, call `job(config, as_given)`, and exit.

    A UserFacingError is printed as one line and exits with its code.
    """
    args = sys.argv[1:] if args is None else args
    setup_logging()
    with contextlib.redirect_stdout(cast(TextIO, _Outlet(sys.stdout))):
        code = _run(cls, job, what, usage, args)
        sys.stdout.flush()
    sys.exit(code)


def _run(
    cls: type[T],
    job: Callable[[T, dict[str, Any]], int],
    what: str,
    usage: str,
    args: Sequence[str],
) -> int:
    if any(a in ("-h", "--help", "help") for a in args):
        print(format_help(cls, what, usage))
        return EXIT_DONE
    # As Ctrl-C, so that what is half-written is cleared away; training sets its own handlers.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        config, given = load_config(cls, args)
        check_lasting(config)
        return job(config, given)
    except UserFacingError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        return EXIT_STOPPED
    except OSError as error:
        if error.filename is None:
            raise
        print(f"error: {error.filename}: {error.strerror}", file=sys.stderr, flush=True)
        return EXIT_FAILED


class _Outlet:
    """Standard output that may lose its reader, as it does with `| head` or when `tee` is stopped:
    the rest goes nowhere, and the job ends as it would have."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with self._nobody_reading():
            return self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._nobody_reading():
            self._stream.flush()

    @contextlib.contextmanager
    def _nobody_reading(self) -> Iterator[None]:
        try:
            yield
        except BrokenPipeError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)


def leave(code: int) -> NoReturn:
    """End a process that trained, without finalising the interpreter.

    Gloo's threads outlive `destroy_process_group`, because caches of torch hold the mesh. One that
    still drops a tensor while the interpreter is finalised aborts the process: one in some sixty
    runs on a busy machine did.
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def setup_logging(rank: int | None = None, file: Path | None = None) -> None:
    """One line per event on standard error; `rank` is shown where there are several.

    With `file` everything goes there, and only warnings also to standard error.
    """
    level = os.environ.get("MODULAR_LM_LOG", "INFO").upper()
    who = "" if rank is None else f"[rank {rank}] "
    handlers: list[logging.Handler] = [logging.StreamHandler()]
    if file is not None:
        handlers[0].setLevel(logging.WARNING)
        file.parent.mkdir(parents=True, exist_ok=True)
        handlers.append(logging.FileHandler(file))
    logging.basicConfig(
        level=level,
        format=f"%(asctime)s {who}%(message)s",
        datefmt="%H:%M:%S",
        handlers=handlers,
        force=True,
    )
    # The S3 client tells where it found its settings, for each of its instances.
    for name in ("aiobotocore", "botocore"):
        logging.getLogger(name).setLevel(logging.WARNING)
