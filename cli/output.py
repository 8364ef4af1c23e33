"""Output of a program that outlives its reader: what nobody can read any more is dropped, and ends nothing.

Nor does a reader that pauses, as by Ctrl-S or in `less`, hold anybody up: a thread writes, and lines wait for it. The
oldest of too many are dropped: the last say why a program ends.
"""

import atexit
import errno
import os
import select
import threading
from collections import deque
from collections.abc import Callable
from functools import partial
from time import monotonic
from typing import TextIO

WAITING_CHARACTERS = 1 << 20  # of lines that were not read yet, at most
PAUSE_S = 1.0  # of a reader, at our end: it reads no more
FLUSH_S = 5.0  # for all that one reads
PIECE_BYTES = 4096  # written at once, so that it is seen whether anybody reads
_PASSES = (errno.ENOSPC, errno.EDQUOT)  # a disk has room again later; a closed terminal never comes back


class Writer:
    """Thread that writes lines to the standard streams, in the order in which they were put."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._waiting: deque[tuple[TextIO, str]] = deque()
        self._size = 0  # of those that wait and of those that are being written
        self._dropped = 0  # lines, between what is being written and what waits
        self._taken = 0  # pieces, by readers
        self._started = False

    def put(self, stream: TextIO | None, text: str) -> None:
        """Have `text`, of whole lines, written; drop the oldest if too many wait, and say so in their place."""
        if stream is None or not text:  # None: closed before we were started
            return
        with self._changed:
            self._waiting.append((stream, text))
            self._size += len(text)
            while self._size > WAITING_CHARACTERS and len(self._waiting) > 1:
                _, oldest = self._waiting.popleft()
                self._size -= len(oldest)
                self._dropped += oldest.count("\n")
            self._changed.notify_all()
            if not self._started:
                self._started = True
                threading.Thread(target=self._run, name="output", daemon=True).start()

    def flush(self, pause_s: float = PAUSE_S, flush_s: float = FLUSH_S) -> None:
        """Return when all is written, when nobody has read anything for `pause_s`, or after `flush_s`."""
        end = monotonic() + flush_s
        with self._changed:
            while self._size:
                left = min(pause_s, end - monotonic())
                if not self._changed.wait_for(partial(self._went_on, self._taken), left):
                    return

    def _went_on(self, taken: int) -> bool:
        return not self._size or self._taken > taken

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: bool(self._waiting))
                stream, text = self._waiting.popleft()
                missing, self._dropped = self._dropped, 0
            if missing:
                notice = f"millrace: {missing} lines are missing here, since nobody read those before them\n"
                _write_past_buffer(stream, notice, self._note_taken)
            _write_past_buffer(stream, text, self._note_taken)
            with self._changed:
                self._size -= len(text)
                self._changed.notify_all()

    def _note_taken(self) -> None:
        with self._changed:
            self._taken += 1
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


def _write_past_buffer(stream: TextIO, text: str, note_taken: Callable[[], None] = lambda: None) -> None:
    """Do the same without the stream's lock, which the interpreter wants at its end, whoever reads or not.

    Call `note_taken` after each piece, of whole lines where they are short, as others may write there, too.
    """
    data, at = text.encode(stream.encoding, "backslashreplace"), 0
    try:
        while at < len(data):
            end = data.rfind(b"\n", at, at + PIECE_BYTES) + 1 or at + PIECE_BYTES
            try:
                at += os.write(stream.fileno(), data[at:end])
                note_taken()
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
