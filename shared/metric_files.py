"""Files of prometheus-client's multiprocess directory, whose bytes are reserved before they are written.

The library maps files with holes. A hole that a full disk has no room for ends the process that writes there, by
SIGBUS, and what it counts is not worth that.
"""

import contextlib
import mmap
import os
import sys

from prometheus_client import values
from prometheus_client.mmap_dict import MmapedDict

from shared.log import logger

FIRST_BYTES = 1 << 16  # of a file
_ENTRY_BYTES = 4 + 8 + 16  # of a value besides its key: length, padding, and two floats

_log = logger(__name__)


class ReservedDict(MmapedDict):
    """Values of one process in a file that others read; in memory for itself, once the file's disk is full."""

    def __init__(self, filename: str, read_mode: bool = False) -> None:
        opened = filename if read_mode else _reserved(filename)
        super().__init__(opened, read_mode)  # type: ignore[no-untyped-call]
        self._is_shown = opened == filename

    def _init_value(self, key: str) -> None:
        if self._is_shown:
            try:
                os.posix_fallocate(self._f.fileno(), 0, self._used + len(key.encode()) + _ENTRY_BYTES)
            except OSError as error:
                self._leave_file(error)
        super()._init_value(key)  # type: ignore[no-untyped-call]

    def _leave_file(self, error: OSError) -> None:
        self._is_shown = False
        _warn(self._fname, error)
        memory = os.fdopen(os.memfd_create("metrics"), "a+b")
        memory.truncate(self._capacity)
        mapped = mmap.mmap(memory.fileno(), self._capacity)
        mapped[: self._used] = self._m[: self._used]  # to read a hole behind it takes room, too
        self._f.close()
        self._f, self._m = memory, mapped


def _reserved(filename: str) -> str:
    """Return the name of a file with room in it: this one, or one in memory that nobody else sees.

    It has its name once it has room: an empty file is an error to whoever reads the directory at that moment.
    """
    unfinished = filename if os.path.exists(filename) else f"{filename}.new"
    try:
        with open(unfinished, "ab") as file:
            os.posix_fallocate(file.fileno(), 0, FIRST_BYTES)
        os.rename(unfinished, filename)
    except OSError as error:
        _warn(filename, error)
        with contextlib.suppress(OSError):  # there was not even room for its name
            os.unlink(unfinished)
        memory = os.memfd_create("metrics")  # left open: the name is of the descriptor
        os.ftruncate(memory, FIRST_BYTES)
        return f"/proc/self/fd/{memory}"
    return filename


def _warn(filename: str, error: OSError) -> None:
    _log.warning("new metrics of this process are not shown", extra={"file": filename, "reason": str(error)})


def install() -> None:
    """Have the library use such files, where the system can reserve them: before the first metric is made."""
    if sys.platform == "linux":
        values.MmapedDict = ReservedDict  # type: ignore[attr-defined]  # the library imports it there
