"""Signals become one stop request; what happens then is the trainer's and the e2e tests' matter."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from modular_lm.tracking.run_folder import RunFolder
from modular_lm.train.driver import stop_on_signals

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    folder = RunFolder(tmp_path)
    folder.create()
    return folder


def send(number: signal.Signals) -> None:
    """Python runs the handler in this thread before `kill` returns."""
    os.kill(os.getpid(), number)


def requests(folder: RunFolder) -> list[str]:
    return [e["reason"] for e in folder.events() if e["event"] == "stop_requested"]


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_asks_for_a_stop_and_is_recorded(
    folder: RunFolder, number: signal.Signals
) -> None:
    with stop_on_signals(folder):
        assert folder.stop_requested() is None
        send(number)
        assert folder.stop_requested() == number.name
    assert requests(folder) == [number.name]


def test_further_signals_change_nothing(folder: RunFolder) -> None:
    with stop_on_signals(folder):
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            send(number)
    assert folder.stop_requested() == "SIGTERM"
    assert requests(folder) == ["SIGTERM"]


def test_a_second_interrupt_aborts(folder: RunFolder) -> None:
    with stop_on_signals(folder):
        send(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)
    assert requests(folder) == ["SIGINT"]


def test_interrupts_of_an_earlier_run_do_not_count(folder: RunFolder) -> None:
    for _ in range(2):
        with stop_on_signals(folder):
            send(signal.SIGINT)


@pytest.mark.parametrize("fails", [False, True])
def test_the_handlers_that_were_there_come_back(folder: RunFolder, fails: bool) -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    try:
        with stop_on_signals(folder):
            assert all(signal.getsignal(n) is not b for n, b in zip(SIGNALS, before, strict=True))
            if fails:
                raise OSError
    except OSError:
        assert fails
    assert [signal.getsignal(number) for number in SIGNALS] == before
