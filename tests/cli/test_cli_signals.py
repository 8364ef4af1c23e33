"""Signals that ask a command to end: they do, whatever runs when they come."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from machine import PATIENCE_S

from cli import signals

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# A module whose import is interrupted where the interpreter prints an exception and goes on.
LOSES = """
import os, signal, sys
class Finalised:
    def __del__(self):
        os.kill(os.getpid(), signal.{signal})
        for _ in range(1000): pass
Finalised()
print("went on", flush=True)
"""

COMMAND = """
import signal
for number in (signal.SIGINT, signal.SIGHUP):
    signal.signal(number, signal.SIG_DFL)
from cli.main import main
main(["status"])
"""


@pytest.fixture(autouse=True)
def kept() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in ENDING}
    for number in (signal.SIGINT, signal.SIGHUP):  # which whoever runs the tests by `nohup` and `&` has ignored
        signal.signal(number, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
    signals._received.clear()


@pytest.mark.parametrize("started_by_nohup", [True, False])
def test_a_closed_terminal_is_a_reason_to_end_unless_nohup_said_no(started_by_nohup: bool) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN if started_by_nohup else signal.SIG_DFL)
    signals.handle(print)
    assert (signal.getsignal(signal.SIGHUP) is print) is not started_by_nohup
    assert signal.getsignal(signal.SIGINT) is signal.getsignal(signal.SIGTERM) is print


def test_a_ctrl_c_for_the_foreground_ends_nothing_that_a_script_runs_behind_but_a_server() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for begin in (signals.end_at_once, signals.end_by_exception, signals.end_by_exception_or_later):
        begin()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        assert signal.getsignal(signal.SIGTERM) is not signal.SIG_IGN
    signals.hand_over(print)
    assert signal.getsignal(signal.SIGINT) is print


@pytest.mark.parametrize("number", ENDING)
def test_one_whose_exception_is_lost_is_handed_over(number: signal.Signals) -> None:
    handed: list[int] = []
    signals.end_by_exception_or_later()
    with pytest.raises(KeyboardInterrupt):  # as where a finaliser runs
        signal.raise_signal(number)
    signals.hand_over(lambda number, _: handed.append(number))
    assert handed == [number]
    signal.raise_signal(number)
    assert handed == [number, number]


@pytest.mark.system
@pytest.mark.parametrize("number", ENDING)
def test_a_command_that_imports_is_ended_even_where_an_exception_would_be_lost(
    tmp_path: Path, number: signal.Signals
) -> None:
    """The finaliser stands for the callbacks of the import system, in which a KeyboardInterrupt is printed and lost."""
    (tmp_path / "msgspec.py").write_text(LOSES.format(signal=number.name))
    done = subprocess.run(
        [sys.executable, "-c", COMMAND],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(Path(__file__).parents[2])])},
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (-number, "", "")
