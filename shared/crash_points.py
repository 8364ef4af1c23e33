"""Crash points: named steps at which a test makes a process die or stop.

`crash_point("<service>.<step>.before")` and `.after` surround steps that another replica must be able to repeat: sends,
acks, writes of journals. They do nothing unless `crash_at` is set: "engine.tokens.after" ends the process there the
first time, "engine.tokens.after:3" the third time, and "engine.tokens.after:3:stop" stops it there with SIGSTOP,
and "engine.step.before:3:hang" blocks the calling thread there for ever, while the others go on.
"""

import os
import re
import signal
import threading

from shared.errors import ConfigError

_STATUS = 137  # what a shell says of a process that was killed with SIGKILL

_point = ""
_left = 0
_how = ""


def arm(crash_at: str) -> None:
    """Set the crash point; empty: none.

    Raises:
        ConfigError: `crash_at` is malformed.
    """
    global _point, _left, _how
    found = re.fullmatch(r"([^:]*)(?::([1-9][0-9]*)(?::(stop|hang))?)?", crash_at)
    if found is None:
        raise ConfigError(f"crash_at: {crash_at!r} is not POINT, POINT:TIMES, POINT:TIMES:stop or POINT:TIMES:hang")
    _point, _left, _how = found[1], int(found[2] or 1), found[3] or ""


def crash_point(point: str) -> None:
    """End this process at once, with nothing closed or flushed, or stop it or block this thread, at the point set."""
    global _left
    if point != _point:
        return
    _left -= 1
    if _left != 0:
        return
    match _how:
        case "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        case "hang":
            threading.Event().wait()
        case _:
            os._exit(_STATUS)
