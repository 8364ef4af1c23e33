"""Versions of the messages: which ones this build reads and writes, and how one becomes the next.

A deployment writes the newest version that all its living replicas read, as their leases say. So while an update rolls
through, everything is written for the old build, and the new one translates: what it writes into the old version, what
it reads into the new one. Nothing else in the code knows of older versions.

To change a message in a way that is no new field with a default: raise VERSION, leave OLDEST where it is, and enter the
`Translation` that leads to the new version. The next release but one raises OLDEST and drops it.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import msgspec

VERSION = 1  # the newest version that this build reads, and writes once nobody needs an older one
OLDEST = 1  # the oldest version that it reads and writes; one below VERSION at the least


class Translation(NamedTuple):
    """Functions of a type's name and a value of it, as msgpack has it (maps, or arrays of array-like structs)."""

    up: Callable[[str, Any], Any]  # from the version before
    down: Callable[[str, Any], Any]  # to the version before


TRANSLATIONS: Mapping[int, Translation] = {}  # by the version that they lead up to


def translate(kind: str, data: bytes, before: int, after: int) -> bytes:
    """Return an encoded value of type `kind` in another version.

    Raises:
        msgspec.MsgspecError: `data` is no msgpack.
    """
    value = msgspec.msgpack.decode(data)
    for version in range(before + 1, after + 1):
        value = TRANSLATIONS[version].up(kind, value)
    for version in range(before, after, -1):
        value = TRANSLATIONS[version].down(kind, value)
    return msgspec.msgpack.encode(value)


class WriteVersion:
    """The version in which this process writes. It has one, as it belongs to one deployment.

    It falls at once when a replica comes that needs an older version, and rises when none has been there for a while: a
    replica that was paused, or crashed and starts again, should find what it can read.
    """

    def __init__(self) -> None:
        self.number = OLDEST
        self._higher_since: float | None = None

    def settle(self, needed: int, now: float, grace_s: float) -> bool:
        """Take into account the newest version that all living replicas read; return whether this lowers ours."""
        target = max(OLDEST, min(needed, VERSION))
        if target <= self.number:
            lowered, self.number, self._higher_since = target < self.number, target, None
            return lowered
        self._higher_since = now if self._higher_since is None else self._higher_since
        if now - self._higher_since >= grace_s:
            self.number, self._higher_since = target, None
        return False


WRITES = WriteVersion()
