"""A process dies at the named moment, and at no other."""

import os
import signal
import subprocess
import sys

import pytest
from machine import PATIENCE_S

from shared import crash
from shared.errors import ConfigError

_PROGRAM = """
import sys
from shared import crash
crash.arm(sys.argv[1])
for turn in range(3):
    crash.reach("engine.tokens.before")
    print(turn, flush=True)
    crash.reach("engine.tokens.after")
"""


def _run(crash_at: str) -> tuple[int, str]:
    done = subprocess.run([sys.executable, "-c", _PROGRAM, crash_at], capture_output=True, text=True, check=False)
    return done.returncode, done.stdout


@pytest.mark.parametrize(
    ("crash_at", "status", "printed"),
    [
        ("engine.tokens.before", 137, ""),
        ("engine.tokens.after", 137, "0\n"),
        ("engine.tokens.before:3", 137, "0\n1\n"),
        ("engine.tokens.after:3", 137, "0\n1\n2\n"),
        ("engine.tokens.after:4", 0, "0\n1\n2\n"),
        ("engine.tokens", 0, "0\n1\n2\n"),
        ("", 0, "0\n1\n2\n"),
    ],
)
def test_dies_at_the_named_moment(crash_at: str, status: int, printed: str) -> None:
    assert _run(crash_at) == (status, printed)


def test_stands_still_until_told_to_go_on() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", _PROGRAM, "engine.tokens.after:2:stop"], stdout=subprocess.PIPE, text=True
    ) as process:
        _, status = os.waitpid(process.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status)
        process.send_signal(signal.SIGCONT)
        out, _ = process.communicate(timeout=PATIENCE_S)
    assert (process.returncode, out) == (0, "0\n1\n2\n")


@pytest.mark.parametrize("rest", ["", "0", "-1", "x", "1:go", "1:stop:2", "stop"])
def test_what_follows_a_point_is_a_count_and_perhaps_stop(rest: str) -> None:
    with pytest.raises(ConfigError, match="crash_at"):
        crash.arm(f"engine.tokens.after:{rest}")
