"""How jobs end: the exit code, and one line instead of a traceback for what the user can mend."""

from __future__ import annotations

import errno
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from modular_lm.cli import run_job, setup_logging
from modular_lm.config.schema import TrainConfig, key
from modular_lm.errors import (
    AgreedError,
    CheckpointError,
    ConfigError,
    DataError,
    RunFailedError,
    UserFacingError,
)
from tests.support import REPO


@dataclass
class JobConfig:
    src: str = key("", "what is read")
    count: int = key(1, "how often", ge=1)


@pytest.fixture(autouse=True)
def logging_as_before() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    for handler in set(root.handlers) - set(handlers):
        handler.close()
    root.handlers[:] = handlers
    root.setLevel(level)


def run(job: Callable[[Any, dict[str, Any]], int], *args: str, cls: type = JobConfig) -> Any:
    """The exit code with which `job` ends."""
    with pytest.raises(SystemExit) as caught:
        run_job(cls, job, what="Does a thing.", usage="python -m job key=value", args=args)
    return caught.value.code


def raising(error: BaseException) -> Callable[[Any, dict[str, Any]], int]:
    def job(config: Any, given: dict[str, Any]) -> int:
        raise error

    return job


@pytest.mark.parametrize("code", [0, 1, 2, 3])
def test_the_code_a_job_returns_is_the_exit_code(
    code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(lambda config, given: code) == code
    assert capsys.readouterr() == ("", "")


def test_a_job_gets_its_config_and_what_was_given() -> None:
    seen: list[Any] = []

    def job(config: Any, given: dict[str, Any]) -> int:
        seen.extend((config, given))
        return 0

    assert run(job, "count=3") == 0
    assert seen == [JobConfig(count=3), {"count": 3}]


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UserFacingError("why"), 1),
        (RunFailedError("why"), 1),
        (ConfigError("why"), 2),
        (DataError("why"), 2),
        (CheckpointError("why"), 2),
        (AgreedError("why", 1), 1),
        (AgreedError("why", 2), 2),
    ],
    ids=lambda value: type(value).__name__,
)
def test_errors_for_the_user_are_one_line_and_their_code(
    error: UserFacingError, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(raising(error)) == code
    assert capsys.readouterr() == ("", "error: why\n")


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("cuont=3", "unknown key cuont: did you mean count?"),
        ("count=0", "count=0: expected a number >= 1"),
        ("count=many", "count='many': expected a whole number"),
        ("config=missing.yaml", "missing.yaml"),
    ],
)
def test_a_bad_argument_ends_before_the_job_begins(
    argument: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(raising(AssertionError("the job began")), argument) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert said in err
    assert err.count("\n") == 1


def test_a_file_that_cannot_be_used_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(raising(PermissionError(errno.EACCES, "Permission denied", "/there"))) == 1
    assert capsys.readouterr().err == "error: /there: Permission denied\n"


def test_an_interrupt_is_a_stop(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(raising(KeyboardInterrupt())) == 3
    assert capsys.readouterr().err == "interrupted\n"


@pytest.mark.parametrize("error", [ZeroDivisionError("ours"), OSError("no file to blame")])
def test_what_is_our_bug_is_not_hidden(error: Exception) -> None:
    with pytest.raises(type(error)) as caught:
        run_job(JobConfig, raising(error), what="", usage="", args=[])
    assert caught.value is error


def test_our_bugs_leave_a_traceback_and_exit_1(tmp_path: Path) -> None:
    script = tmp_path / "job.py"
    script.write_text(
        "from modular_lm.cli import run_job\n"
        "from modular_lm.config.schema import GenerateConfig\n"
        "run_job(GenerateConfig, lambda config, given: 1 // 0, what='', usage='')\n"
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert done.stderr.endswith("ZeroDivisionError: integer division or modulo by zero\n")


@pytest.mark.parametrize("flag", ["--help", "-h", "help"])
def test_help_says_what_the_job_does_and_lists_its_keys(
    flag: str, capsys: pytest.CaptureFixture[str]
) -> None:
    # Also beside arguments that would be refused.
    assert run(raising(AssertionError("the job began")), "nonsense=1", flag) == 0
    out, err = capsys.readouterr()
    assert err == ""
    for part in ("Does a thing.", "python -m job key=value", "count", "whole number", "how often"):
        assert part in out


def test_help_of_the_training_job_names_every_leaf(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(raising(AssertionError()), "--help", cls=TrainConfig) == 0
    out = capsys.readouterr().out
    for name in ("dump_dir", "data.tokenizer.path", "model.module_agg", "checkpoint.dump.every"):
        assert name in out
    assert "drop|avg|mean|sum|stack" in out


def test_with_a_file_only_warnings_reach_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MODULAR_LM_LOG", raising=False)
    file = tmp_path / "logs" / "rank_1.log"
    setup_logging(1, file)
    logging.getLogger("modular_lm.test").info("quiet")
    logging.getLogger("modular_lm.test").warning("loud")
    shown, written = capsys.readouterr().err, file.read_text()
    assert "[rank 1] loud" in shown
    assert "quiet" not in shown
    assert "[rank 1] quiet" in written
    assert "[rank 1] loud" in written


def test_a_job_whose_reader_has_gone_ends_as_it_would_have(tmp_path: Path) -> None:
    script = tmp_path / "job.py"
    script.write_text(
        "from modular_lm.cli import run_job\n"
        "from tests.test_cli import JobConfig\n"
        "def job(config, given):\n"
        "    print('a line\\n' * 10000)\n"
        "    print('the last line')\n"
        "    return 3\n"
        "run_job(JobConfig, job, what='', usage='')\n"
    )
    read = subprocess.Popen(
        [sys.executable, str(script)],
        env={**os.environ, "PYTHONPATH": str(REPO)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert read.stdout is not None
    assert read.stderr is not None
    read.stdout.readline()
    read.stdout.close()
    assert read.stderr.read() == b""
    assert read.wait(60) == 3
