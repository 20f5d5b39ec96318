"""What a failed Ray job says to its user: the first cause, on one line, and its exit code."""

from __future__ import annotations

from modular_lm.errors import EXIT_FAILED, UserFacingError, reason


def explain(error: BaseException) -> tuple[str, int]:
    """The message and the exit code for an exception that Ray hands over.

    Ray wraps what was raised (in workers, in tasks of Ray Data) and puts whole tracebacks into
    the text; the innermost exception is what happened.
    """
    cause = cause_of(error)
    if isinstance(cause, UserFacingError):
        return str(cause), cause.exit_code
    # The text of a wrapped traceback ends with the line that matters.
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    is_traceback = any(line.startswith("Traceback") for line in lines)
    text = lines[-1] if is_traceback else reason(cause)
    return f"training failed: {text}", EXIT_FAILED


def cause_of(error: BaseException) -> BaseException:
    """What happened, without what Ray has wrapped around it."""
    seen: set[int] = set()
    while id(error) not in seen:
        seen.add(id(error))
        if failures := getattr(error, "worker_failures", None):
            error = _first(failures)
            continue
        for name in ("_base_exc", "controller_failure", "cause", "__cause__"):
            inner = getattr(error, name, None)
            if isinstance(inner, BaseException):
                error = inner
                break
    return error


def _first(failures: dict[int, BaseException]) -> BaseException:
    """Of several ranks' failures the one meant for a user, else the lowest rank's.

    When a rank fails, the others fail too, in their collectives.
    """
    causes = [cause_of(failures[rank]) for rank in sorted(failures)]
    return next((c for c in causes if isinstance(c, UserFacingError)), causes[0])
