"""Crash points: named steps at which a test makes a process die or stop.

`crash_point("<service>.<step>.before")` and `.after` surround steps that another replica must be able to repeat: sends,
acks, writes of journals. They do nothing unless `crash_at` is set: "engine.tokens.after" ends the process there the
first time, "engine.tokens.after:3" the third time, and "engine.tokens.after:3:stop" stops it there with SIGSTOP.
"""

import os
import re
import signal

from shared.errors import ConfigError

_STATUS = 137  # what a shell says of a process that was killed with SIGKILL

_point = ""
_left = 0
_stops = False


def arm(crash_at: str) -> None:
    """Set the crash point; empty: none.

    Raises:
        ConfigError: `crash_at` is malformed.
    """
    global _point, _left, _stops
    found = re.fullmatch(r"([^:]*)(?::([1-9][0-9]*)(:stop)?)?", crash_at)
    if found is None:
        raise ConfigError(f"crash_at: {crash_at!r} is not POINT, POINT:TIMES or POINT:TIMES:stop")
    _point, _left, _stops = found[1], int(found[2] or 1), found[3] is not None


def crash_point(point: str) -> None:
    """End this process at once, with nothing closed or flushed, or stop it, if this is the point set."""
    global _left
    if point != _point:
        return
    _left -= 1
    if _left == 0 and _stops:
        os.kill(os.getpid(), signal.SIGSTOP)
    elif _left == 0:
        os._exit(_STATUS)
