"""What every command shares: arguments to config, `--help`, logging, errors to exit codes.

A job is a function of its config that returns an exit code; `run_job` is the only place that
turns exceptions into messages.
"""

from __future__ import annotations

import atexit
import logging
import os
import select
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from modular_lm.config.load import format_help, load_config
from modular_lm.errors import EXIT_FAILED, EXIT_STOPPED, UserFacingError
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
    if any(a in ("-h", "--help", "help") for a in args):
        print(format_help(cls, what, usage))
        sys.exit(0)
    # As Ctrl-C, so that what is half-written is cleared away; training sets its own handlers.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        config, given = load_config(cls, args)
        check_lasting(config)
        code = job(config, given)
        sys.stdout.flush()
    except UserFacingError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        code = error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        code = EXIT_STOPPED
    except BrokenPipeError:
        if not _nobody_reads():
            raise
        code = EXIT_FAILED
    except OSError as error:
        if error.filename is None:
            raise
        print(f"error: {error.filename}: {error.strerror}", file=sys.stderr, flush=True)
        code = 1
    sys.exit(code)


def _nobody_reads() -> bool:
    """Whether standard output is a pipe whose reader has gone, as `| head` does; then it is let go,
    so that Python's own last flush says nothing."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    if not any(event & select.POLLERR for _, event in poll.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return True


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
