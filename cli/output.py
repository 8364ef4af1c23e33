"""Output of a program that outlives its reader: what nobody can read any more is dropped, and ends nothing."""

import errno
import os
from typing import TextIO

_PASSES = (errno.ENOSPC, errno.EDQUOT)  # a disk has room again later; a closed terminal never comes back


def write(stream: TextIO | None, text: str) -> None:
    """Write and flush `text`, unless the terminal was closed, the pipe's reader has ended, or the disk is full."""
    if stream is None:  # closed before we were started
        return
    try:
        stream.write(text)
        stream.flush()
    except OSError as error:
        if error.errno not in _PASSES:
            silence(stream)


def silence(stream: TextIO) -> None:
    """Let the stream, with what is still in its buffer, lead to nowhere."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)
