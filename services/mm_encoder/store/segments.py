"""Writer of segments: embeddings in memory that this host's engines map, within a number of bytes and an age.

Beside the budget they never take more than half of their file system, which others need, too.
"""

import asyncio
import contextlib
import os
import secrets
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from shared.segments import READERS, Segments, is_marked, reader_path

SHARE = 0.5  # of the file system
UNFINISHED_S = 60.0  # since the last write; then its writer has died
_UNFINISHED = ".new-"


@dataclass(frozen=True, slots=True)
class _File:
    path: Path
    size: int
    used: float  # unix seconds


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

    async def write(self, key: str, data: memoryview) -> bool:
        """Write a segment, in place of those used longest ago; return False if there is no room for it."""
        return await asyncio.to_thread(self._write, key, data)

    async def sweep(self) -> None:
        """Remove what is too old, and what dead processes left."""
        with contextlib.suppress(OSError):  # somebody has removed the directory
            await asyncio.to_thread(self._sweep, 0)

    def _write(self, key: str, data: memoryview) -> bool:
        if len(data) > self._budget:
            return False
        unfinished = self._segments.directory / f"{_UNFINISHED}{secrets.token_hex(8)}"
        try:
            self._sweep(len(data))
            _write_all(unfinished, data)
            unfinished.rename(self._segments.path(key))
        except OSError:  # the file system is full, of other things, or somebody has removed the directory
            unfinished.unlink(missing_ok=True)
            return False
        return True

    def _sweep(self, needed: int) -> None:
        """Remove what is too old, and of the rest what was used longest ago until `needed` bytes fit."""
        now, free = time.time(), self._budget - needed
        for file in sorted(self._files(), key=lambda file: file.used, reverse=True):
            longest = UNFINISHED_S if file.path.name.startswith(_UNFINISHED) else self._ttl_s
            free -= file.size
            if free < 0 or now - file.used > longest:
                file.path.unlink(missing_ok=True)
        for mark in (self._segments.directory / READERS).iterdir():
            is_marked(mark)

    def _files(self) -> Iterable[_File]:
        for entry in os.scandir(self._segments.directory):
            with contextlib.suppress(FileNotFoundError):  # another encoder sweeps, too
                if entry.is_file(follow_symlinks=False):
                    stat = entry.stat(follow_symlinks=False)
                    yield _File(Path(entry.path), stat.st_size, stat.st_mtime)


def _write_all(path: Path, data: memoryview) -> None:
    """Write a new file. By `write`, since a full file system is an error then; written memory would be a signal."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        while data:
            data = data[os.write(fd, data) :]
    finally:
        os.close(fd)
