"""Writer of segments: embeddings in memory that this host's engines map, within a number of bytes and an age.

What was used within the last minute may have been announced to an engine that has yet to map it. It stays, and what
then has no room goes through Redis. Files take no more than `budget`, and than half of their file system; files that
were removed take memory beside it until engines that have mapped them let go, so a write also looks at what is free.

A page that is new costs more than what is written to it, and one that is new to a virtual machine ten times as much. So
the pages of a large segment are taken while its embeddings are computed (`prepare`).
"""

import asyncio
import contextlib
import os
import re
import secrets
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from shared.segments import CARDS, READERS, Segments, is_marked, reader_path

SHARE = 0.5  # of the file system
RECENT_S = 60.0  # since a segment was written, found or mapped; until then none is removed for want of room
PART = 8  # of the budget: at most so much is written between two looks at what others wrote, and so much stays free
FULL_S = 1.0  # no room was found; so long nobody looks again
UNFINISHED_S = 60.0  # since the last write; then its writer has died, or has waited for so long that it begins anew
LARGE = 4 << 20  # bytes of a segment that is worth a thread's way there and back to prepare
_ZEROS = memoryview(bytes(LARGE))
_UNFINISHED = ".new-"
_OURS = re.compile(rf"[0-9a-f]{{64}}|{re.escape(_UNFINISHED)}.*")


class _File(NamedTuple):
    """File of ours. A directory may have thousands, which are listed while the interpreter does nothing else."""

    path: str
    size: int
    used: float  # unix seconds
    finished: bool

    def remove(self) -> None:
        with contextlib.suppress(FileNotFoundError):  # another encoder was faster
            os.unlink(self.path)


@dataclass(slots=True)
class Unwritten:
    """Memory for a segment of `size` bytes: an unfinished file, until it has been written."""

    path: Path
    size: int
    written: bool = False
    given_up: bool = False  # nobody waits for it any more


class SegmentStore:
    """Segments of one host. `engines` returns the names of the engines that live.

    Raises:
        ConfigError: as `Segments`.
    """

    def __init__(
        self, directory: Path, budget: int, ttl_s: float, engines: Callable[[], Awaitable[Iterable[str]]]
    ) -> None:
        self._segments = Segments(directory)
        disk = os.statvfs(directory)
        self._budget = min(budget, int(SHARE * disk.f_frsize * disk.f_blocks))
        self._ttl_s = ttl_s
        self._engines = engines
        self._lock = threading.Lock()  # of what follows
        self._room = 0  # bytes that may be written before the directory is listed again
        self._full_until = 0.0  # by the monotonic clock

    async def reaches_all(self) -> bool:
        """Return True if there are engines, and all that live read in this directory."""
        names = list(await self._engines())
        return bool(names) and all(is_marked(reader_path(self._segments, name)) for name in names)

    def holds(self, key: str) -> bool:
        """Return True if there is a segment of `key`, which is then the one used last."""
        try:
            os.utime(self._segments.path(key))
        except OSError:
            return False
        return True

    def read(self, key: str) -> memoryview | None:
        """Map a segment; None if it is gone."""
        return self._segments.read(key)

    @asynccontextmanager
    async def prepare(self, size: int) -> AsyncIterator[Awaitable[Unwritten | None]]:
        """Take memory for a segment of `size` bytes. What has not been written by the block's end is given back."""
        unwritten = self._unwritten(size)
        making = asyncio.ensure_future(asyncio.to_thread(self._prepare, unwritten))
        try:
            yield asyncio.shield(making)
        finally:  # without a wait, which might be cancelled
            unwritten.given_up = True  # first: what the thread makes after this it removes itself
            if not unwritten.written:
                unwritten.path.unlink(missing_ok=True)

    async def write(self, key: str, data: memoryview, unwritten: Unwritten | None = None) -> bool:
        """Write a segment, in place of those used longest ago; return False if there is no room for it.

        `unwritten`: memory that was prepared for it. It may have been swept, if that is long ago.
        """
        return await asyncio.to_thread(self._write, key, data, unwritten)

    async def sweep(self) -> None:
        """Remove what is too old, and what dead processes left."""
        with contextlib.suppress(OSError):  # somebody has removed the directory
            await asyncio.to_thread(self._sweep)

    def _unwritten(self, size: int) -> Unwritten:
        return Unwritten(self._segments.directory / f"{_UNFINISHED}{secrets.token_hex(8)}", size)

    def _prepare(self, unwritten: Unwritten) -> Unwritten | None:
        """Take memory for a segment, page by page; None if there is no room for it, or it is given up."""
        if unwritten.given_up or not self._begin(unwritten):
            return None
        try:
            _fill(unwritten.path, _zeros(unwritten))
        except OSError:
            unwritten.given_up = True
        if unwritten.given_up:
            unwritten.path.unlink(missing_ok=True)
            return None
        return unwritten

    def _write(self, key: str, data: memoryview, unwritten: Unwritten | None) -> bool:
        if unwritten is None or unwritten.size != len(data) or not unwritten.path.exists():
            unwritten = self._unwritten(len(data))
            if not self._begin(unwritten):
                return False
        try:
            _fill(unwritten.path, [data])
            with self._lock:  # a list of the directory may have neither name of a file that is renamed meanwhile
                unwritten.path.rename(self._segments.path(key))
        except OSError:  # the file system is full, of other things, or somebody has removed the directory
            unwritten.path.unlink(missing_ok=True)
            return False
        unwritten.written = True
        return True

    def _begin(self, unwritten: Unwritten) -> bool:
        """Make an unfinished file; return False if there is no room for it."""
        try:
            with self._lock:
                if not self._has_room(unwritten.size):
                    return False
                _create(unwritten.path, unwritten.size)
        except OSError:
            unwritten.path.unlink(missing_ok=True)
            return False
        return True

    def _has_room(self, needed: int) -> bool:
        """Take `needed` bytes of the room; return False if there is not as much."""
        if needed > self._budget:
            return False
        if needed > min(self._room, self._on_disk()):
            if time.monotonic() < self._full_until:
                return False
            self._make_room(needed)
            if needed > min(self._room, self._on_disk()):
                self._full_until = time.monotonic() + FULL_S
                return False
        self._room -= needed
        return True

    def _on_disk(self) -> int:
        """Return how many bytes the file system has for us."""
        disk = os.statvfs(self._segments.directory)
        return disk.f_frsize * disk.f_bavail - self._budget // PART

    def _make_room(self, needed: int) -> None:
        """List the directory, and remove what was used longest ago if `needed` bytes do not fit.

        Then some more is removed, so that a directory that is full is not listed for every write. Nothing is if what
        may be removed is not enough.
        """
        now = time.time()
        files = sorted(self._files(), key=lambda file: file.used)
        free, gained = min(self._budget - sum(file.size for file in files), self._on_disk()), 0
        victims: list[_File] = []
        if free < needed:
            for file in files:
                if free + gained >= needed + self._budget // PART or now - file.used <= RECENT_S:
                    break
                if file.finished:
                    victims.append(file)
                    gained += file.size
        if free + gained >= needed:
            for file in victims:
                file.remove()
            free += gained
        self._room = max(0, min(free, max(needed, self._budget // PART)))

    def _sweep(self) -> None:
        now = time.time()
        for file in self._files():
            if now - file.used > (self._ttl_s if file.finished else UNFINISHED_S):
                file.remove()
        for directory in (READERS, CARDS):
            for mark in (self._segments.directory / directory).iterdir():
                is_marked(mark)

    def _files(self) -> Iterable[_File]:
        """Yield our files; what others have put there is not ours to count, let alone to remove."""
        for entry in os.scandir(self._segments.directory):
            if _OURS.fullmatch(entry.name) and entry.is_file(follow_symlinks=False):
                try:
                    stat = entry.stat(follow_symlinks=False)
                except FileNotFoundError:  # another encoder sweeps, too
                    continue
                yield _File(entry.path, stat.st_size, stat.st_mtime, not entry.name.startswith(_UNFINISHED))


def _create(path: Path, size: int) -> None:
    """Make a file of this size, so that whoever lists the directory counts all of it."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        os.ftruncate(fd, size)
    finally:
        os.close(fd)


def _zeros(unwritten: Unwritten) -> Iterator[memoryview]:
    """Yield what fills a file, until it is given up."""
    for start in range(0, unwritten.size, len(_ZEROS)):
        if unwritten.given_up:
            return
        yield _ZEROS[: unwritten.size - start]


def _fill(path: Path, parts: Iterable[memoryview]) -> None:
    """Write a file's bytes. By `write`, since a full file system is an error then; written memory would be a signal."""
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        for data in parts:
            while data:
                data = data[os.write(fd, data) :]
    finally:
        os.close(fd)
