"""A process dies at the named moment, and at no other."""

import subprocess
import sys

import pytest

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


@pytest.mark.parametrize("count", ["", "0", "-1", "x"])
def test_a_count_is_a_count(count: str) -> None:
    with pytest.raises(ConfigError, match="is no number of times"):
        crash.arm(f"engine.tokens.after:{count}")
    crash.arm("")
