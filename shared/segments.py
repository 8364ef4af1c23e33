"""Segments: embeddings as files of a directory in memory, handed over between processes of one host without a copy.

mm_encoder writes a segment whole before it gives it its name, so that a name always has all of its bytes. It also
removes segments (services/mm_encoder/store/segments.py); whoever has mapped one keeps its memory. A segment may be gone
at any time, as a blob may: its reader has it made again.

Each engine that reads here has a file in `readers/` and keeps it locked. The kernel lets go of the lock when the
process ends, however it does. So an encoder knows whether a reader sees this very directory, whichever host it is on.
"""

import contextlib
import ctypes
import fcntl
import hashlib
import mmap
import os
import stat
import sys
from pathlib import Path

import numpy as np

from shared.config import variable
from shared.errors import ConfigError

READERS = "readers"
CARDS = "cards"  # pages of engines: shared/card_page.py
_INSTEAD = "name a directory in it, which we then make"
_POPULATE_READ = 22  # MADV_POPULATE_READ of Linux 5.14: all pages at once, which costs a third of touching each
# As a foreign function, which lets go of the interpreter's lock. `mmap.madvise` keeps it, and so does `mmap.mmap` in
# Python 3.11: with MAP_POPULATE, all threads of an engine would wait for the pages of each picture.
_MADVISE = ctypes.CDLL(None).madvise
_MADVISE.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


class Segments:
    """Directory of segments, made if there is none, for this user alone. One that is there is left as it is.

    Raises:
        ConfigError: it cannot be made, is a link or another user's, or others may write in it.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        try:
            directory.parent.mkdir(parents=True, exist_ok=True)
            for path in (directory, directory / READERS, directory / CARDS):
                if reason := _make(path):
                    raise ConfigError(f"{variable('segments_dir')}: {path} cannot be used: {reason}")
        except OSError as error:
            raise ConfigError(f"{variable('segments_dir')}: {directory} cannot be used: {error.strerror}") from error

    def path(self, key: str) -> Path:
        """Return the file of a segment, whatever is in `key`."""
        return self.directory / hashlib.sha256(key.encode()).hexdigest()

    def read(self, key: str) -> memoryview | None:
        """Map a segment, which is then the one used last; None if it is gone. The memory is freed with the view."""
        try:
            fd = os.open(self.path(key), os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError:
            return None
        try:
            os.utime(fd)
            mapped = mmap.mmap(fd, 0, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)
        except (OSError, ValueError):  # ValueError: it is empty
            return None
        finally:
            os.close(fd)
        _populate(mapped)
        return memoryview(mapped)


def _populate(mapped: mmap.mmap) -> None:
    """Take in all pages, without the interpreter's lock."""
    data = np.frombuffer(mapped, np.uint8)
    if sys.platform != "linux" or _MADVISE(data.ctypes.data, data.nbytes, _POPULATE_READ):
        data[:: mmap.PAGESIZE].max()


def _make(directory: Path) -> str | None:
    """Make a directory that only this user may use; return what keeps us from using it if it is there already."""
    with contextlib.suppress(FileExistsError):
        directory.mkdir(mode=0o700)
    found = directory.lstat()
    if not stat.S_ISDIR(found.st_mode):
        return "it is a symbolic link" if stat.S_ISLNK(found.st_mode) else "it is no directory"
    if found.st_uid != os.geteuid():
        return f"it belongs to user {found.st_uid}, and we are {os.geteuid()}; {_INSTEAD}"
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"others may write in it (mode {stat.S_IMODE(found.st_mode):o}); {_INSTEAD}"
    return None


class Reader:
    """Mark in a directory that a replica named `name` reads there, until `close` or the end of this process.

    Raises:
        ConfigError: it cannot be set.
    """

    def __init__(self, segments: Segments, name: str) -> None:
        path = reader_path(segments, name)
        try:
            self._fd = locked_file(path)
        except OSError as error:
            raise ConfigError(f"{variable('segments_dir')}: {path} cannot be locked: {error.strerror}") from error

    def close(self) -> None:
        """Let go of the mark."""
        os.close(self._fd)


def locked_file(path: Path) -> int:
    """Return the descriptor of a locked file that still has this name."""
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(fd, fcntl.LOCK_SH)  # waits for `is_marked`, at most
        if os.fstat(fd).st_nlink:
            return fd
        os.close(fd)


def reader_path(segments: Segments, name: str) -> Path:
    """Return the file that a reader locks."""
    return segments.directory / READERS / hashlib.sha256(name.encode()).hexdigest()


def is_marked(path: Path) -> bool:
    """Return True if a living process has this file locked; remove it if none has."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(fd).st_nlink:  # else this name is another file's by now
            path.unlink(missing_ok=True)
    except OSError:
        return True
    finally:
        os.close(fd)
    return False
