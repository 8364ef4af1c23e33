"""A tethered program takes the place of its command, and dies with the process that started it."""

import os
import subprocess
import sys

import pytest

from shared.tether import tethered

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="no other system has a signal on the parent's death")
PARENT = """
import subprocess, sys
from shared.tether import tethered
child = subprocess.Popen(tethered([sys.executable, "-c", "print('ready', flush=True); import time; time.sleep(600)"]))
child.wait()
"""

pytestmark = pytest.mark.system


def test_it_becomes_the_command() -> None:
    script = "import os, sys; print(os.getpid(), sys.argv[1:]); sys.exit(3)"
    with subprocess.Popen(tethered([sys.executable, "-c", script, "a b", ""]), stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.read().decode() == f"{process.pid} ['a b', '']\n"
    assert process.returncode == 3


@linux_only
def test_it_dies_when_its_parent_is_killed() -> None:
    with subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == b"ready\n"
        parent.kill()
        assert parent.stdout.read() == b""  # the end comes once the child, too, has let go of the pipe


@linux_only
def test_it_does_not_start_for_a_parent_that_has_gone() -> None:
    command = tethered([sys.executable, "-c", "print('started')"])
    command[command.index(str(os.getpid()))] = "0"
    assert subprocess.run(command, capture_output=True, check=True).stdout == b""
