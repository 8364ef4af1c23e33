"""Output of a program that outlives its reader: what nobody can read any more is dropped, and ends nothing.

Nor does a reader that pauses, as by Ctrl-S or in `less`, hold anybody up: a thread writes, and lines wait for it.
"""

import atexit
import errno
import os
import select
import threading
from collections import deque
from typing import TextIO

WAITING_CHARACTERS = 1 << 20  # of lines that were not read yet, at most
FLUSH_S = 1.0
_PASSES = (errno.ENOSPC, errno.EDQUOT)  # a disk has room again later; a closed terminal never comes back


class Writer:
    """Thread that writes lines to the standard streams, in the order in which they were put."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._waiting: deque[tuple[TextIO, str]] = deque()
        self._size = 0  # of those that wait and of those that are being written
        self._dropped = 0
        self._started = False

    def put(self, stream: TextIO | None, text: str) -> None:
        """Have `text`, of whole lines, written; drop it if too much waits already, which is said later."""
        if stream is None or not text:  # None: closed before we were started
            return
        with self._changed:
            if self._size >= WAITING_CHARACTERS:
                self._dropped += text.count("\n")
                return
            if self._dropped:
                text = f"millrace: {self._dropped} lines are missing here, since nobody read those before them\n{text}"
                self._dropped = 0
            self._waiting.append((stream, text))
            self._size += len(text)
            self._changed.notify_all()
            if not self._started:
                self._started = True
                threading.Thread(target=self._run, name="output", daemon=True).start()

    def flush(self, seconds: float = FLUSH_S) -> None:
        """Return when all is written, or after so long."""
        with self._changed:
            self._changed.wait_for(lambda: not self._size, seconds)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: bool(self._waiting))
                stream, text = self._waiting.popleft()
            _write_past_buffer(stream, text)
            with self._changed:
                self._size -= len(text)
                self._changed.notify_all()


def write(stream: TextIO | None, text: str) -> None:
    """Write and flush `text`, unless the terminal was closed, the pipe's reader has ended, or the disk is full."""
    if stream is None:
        return
    try:
        stream.write(text)
        stream.flush()
    except OSError as error:
        _outlive(stream, error)


def _write_past_buffer(stream: TextIO, text: str) -> None:
    """Do the same without the stream's lock, which the interpreter wants at its end, whoever reads or not."""
    rest = memoryview(text.encode(stream.encoding, "backslashreplace"))
    try:
        while rest:
            try:
                rest = rest[os.write(stream.fileno(), rest) :]
            except BlockingIOError:  # somebody who has the same pipe, as Node does, has it not wait
                select.select([], [stream], [])
    except OSError as error:
        _outlive(stream, error)


def _outlive(stream: TextIO, error: OSError) -> None:
    if error.errno not in _PASSES:
        silence(stream)


def silence(stream: TextIO) -> None:
    """Let the stream, with what is still in its buffer, lead to nowhere."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


WRITER = Writer()  # one, as the streams are the process's
atexit.register(WRITER.flush)
