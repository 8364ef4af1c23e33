"""Versions of the messages: which ones this build reads and writes, and how one becomes the next.

A deployment writes the newest version that all its living replicas read, as their leases say. So while an update rolls
through, everything is written for the old build, and the new one translates: what it writes into the old version, what
it reads into the new one. Nothing else in the code knows of older versions.

To change a message in a way that is no new field with a default: raise VERSION, leave OLDEST where it is, and enter the
`Translation` that leads to the new version. The next release but one raises OLDEST and drops it.
"""

import functools
import math
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, NamedTuple, ParamSpec, TypeVar

import msgspec

VERSION = 1  # the newest version that this build reads, and writes once nobody needs an older one
OLDEST = 1  # the oldest version that it reads and writes; one below VERSION at the least

P = ParamSpec("P")
T = TypeVar("T")


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
        self.settled = OLDEST  # by the last look at all leases
        # time.monotonic() until which whoever comes sees our lease, and waits for us. A process that was halted for
        # longer cannot know who has come.
        self.trusted_until = math.inf
        self.said = OLDEST  # what our lease says for certain; 0 while that changes
        self._higher_since: float | None = None
        self._rising_to = OLDEST
        self._fallen_from = OLDEST
        self._under_way: set[object] = set()
        self._begun_before_fall: set[object] = set()

    @property
    def number(self) -> int:
        """The version to write now: the one that was settled, or OLDEST, which everybody reads, after a long halt."""
        if self.settled == OLDEST or time.monotonic() < self.trusted_until:
            return self.settled
        return OLDEST

    @property
    def announced(self) -> int:
        """The newest version in which anything of this process may come: what its lease says.

        It rises before the version does, and falls when all is written that had begun before that fell.
        """
        return max(self.settled, self._rising_to, self._fallen_from if self._begun_before_fall else OLDEST)

    def begin(self) -> object:
        """Note that something is being encoded and written; return what `end` is called with."""
        write = object()
        self._under_way.add(write)
        return write

    def end(self, write: object) -> None:
        self._under_way.discard(write)
        self._begun_before_fall.discard(write)

    def settle(self, needed: int, now: float, grace_s: float) -> bool:
        """Take into account the newest version that all living replicas read; return whether this lowers ours."""
        target = max(OLDEST, min(needed, VERSION))
        if target <= self.settled:
            lowered = target < self.settled
            if lowered:
                self._fallen_from, self._begun_before_fall = self.announced, set(self._under_way)
            self.settled, self._rising_to, self._higher_since = target, target, None
            return lowered
        self._higher_since = now if self._higher_since is None else self._higher_since
        if now - self._higher_since >= grace_s:
            # Announced at an earlier look, so that nobody can have come without seeing it.
            if self._rising_to == target <= self.said:
                self.settled, self._higher_since = target, None
            self._rising_to = target
        return False


WRITES = WriteVersion()


def versioned_write(function: Callable[P, Awaitable[T]]) -> Callable[P, Awaitable[T]]:
    """Decorate a function that encodes messages and writes them: what it has begun counts until it has returned."""

    @functools.wraps(function)
    async def write(*args: P.args, **kwargs: P.kwargs) -> T:
        begun = WRITES.begin()
        try:
            return await function(*args, **kwargs)
        finally:
            WRITES.end(begun)

    return write
