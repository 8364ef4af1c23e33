"""Named moments at which a test makes a process die.

`reach("<service>.<step>.before")` and `.after` stand around the steps that another replica must be able to repeat:
sends, acks, writes of journals. They do nothing unless `crash_at` was set: "engine.tokens.after" ends the process there
the first time, "engine.tokens.after:3" the third time.
"""

import os

from shared.errors import ConfigError

_STATUS = 137  # what a shell says of a process that was killed with SIGKILL

_point = ""
_left = 0


def arm(crash_at: str) -> None:
    """Choose the moment; empty: none, at any time.

    Raises:
        ConfigError: what follows the colon is no count.
    """
    global _point, _left
    _point, colon, count = crash_at.partition(":")
    if colon and not (count.isdecimal() and int(count) > 0):
        raise ConfigError(f"crash_at: {count!r} is no number of times")
    _left = int(count or 1)


def reach(point: str) -> None:
    """End this process at once, with nothing closed or flushed, if this is the moment."""
    global _left
    if point != _point:
        return
    _left -= 1
    if _left <= 0:
        os._exit(_STATUS)
