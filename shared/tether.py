"""Start of a program that dies with the process that starts it, however that ends.

A supervisor that is killed can stop nothing. What it had started would keep its ports and the GPU's memory, and stand
in the way of the next start.
"""

import ctypes
import os
import signal
import sys
from collections.abc import Sequence

DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of <sys/prctl.h>
START = "from shared.tether import main; main()"


def tethered(command: Sequence[str]) -> list[str]:
    """Return the command that runs `command` in the same process, tethered to ours. Only Linux can do so."""
    if sys.platform != "linux":
        return [*command]
    return [sys.executable, "-P", "-c", START, str(os.getpid()), *command]


def main() -> None:
    """Become the program of the arguments, unless the process that the first one names has ended already."""
    parent, *command = sys.argv[1:]
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(DEATH_SIGNAL, signal.SIGKILL) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() == int(parent):
        os.execv(command[0], command)
