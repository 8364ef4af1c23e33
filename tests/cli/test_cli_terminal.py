"""A terminal that is closed under a session's leader which passes nothing on."""

import fcntl
import os
import pty
import subprocess
import sys
import termios
from pathlib import Path

import pytest
from machine import PATIENCE_S

CLOSED, GOES_ON = 7, 8
ENVIRON = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
# Looks, says so, waits until the terminal is hung up, looks again.
LOOKS = f"""
import os, select, sys
from cli.terminal import Terminal
if sys.argv[1] == "background":
    os.setpgid(0, 0)
terminal = Terminal()
poll = select.poll()
poll.register(0, 0)
os.write(int(sys.argv[2]), b"up")
poll.poll()
os._exit({CLOSED} if terminal.was_closed() else {GOES_ON})
"""
WAITS = ["/bin/sh", "-c", 'trap : HUP; "$@"; exit $?', "sh"]  # as `make` does


@pytest.mark.system
@pytest.mark.parametrize(("place", "status"), [("foreground", CLOSED), ("background", GOES_ON)])
def test_it_is_seen_to_be_closed_by_what_was_in_its_foreground(place: str, status: int) -> None:
    ours, theirs = pty.openpty()
    told, tell = os.pipe()
    command = [*WAITS, sys.executable, "-c", LOOKS, place, str(tell)]
    process = subprocess.Popen(
        command,
        stdin=theirs,
        pass_fds=[tell],
        env=ENVIRON,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(theirs, termios.TIOCSCTTY, 0),
    )
    os.close(theirs)
    os.close(tell)
    with os.fdopen(told, "rb") as up:
        assert up.read(2) == b"up"
        os.close(ours)
        assert process.wait(PATIENCE_S) == status


@pytest.mark.system
def test_without_a_terminal_nothing_is_closed() -> None:
    script = "from cli.terminal import Terminal; t = Terminal(); assert not t.was_closed(); t.close()"
    command = [sys.executable, "-c", script]
    assert subprocess.run(command, env=ENVIRON, start_new_session=True, timeout=PATIENCE_S, check=False).returncode == 0
