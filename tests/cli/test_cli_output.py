"""Lines for a reader that may pause, end, or have no room."""

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

import pytest
from machine import PATIENCE_S

from cli.output import FLUSH_S, PAUSE_S, WAITING_CHARACTERS, Writer, _write_past_buffer, silence, write

LINE = "x" * 99 + "\n"
MANY = WAITING_CHARACTERS // len(LINE) + 1  # beyond the limit
HELD = 1 << 16  # of a pipe that nobody reads
FIRST = 2 * HELD // len(LINE)


@contextmanager
def pipe() -> Iterator[tuple[TextIO, TextIO]]:
    reader, writer = os.pipe()
    with os.fdopen(reader) as reading, os.fdopen(writer, "w") as writing:
        yield reading, writing


@pytest.mark.parametrize("blocking", [True, False])
def test_a_reader_that_pauses_holds_nobody_up_and_is_told_what_it_missed(blocking: bool) -> None:
    writer, read = Writer(), list[str]()
    with pipe() as (reading, writing):
        os.set_blocking(writing.fileno(), blocking)
        writer.put(writing, LINE * FIRST)  # which a pipe does not hold
        wait_for_a_piece(writer)
        for _ in range(MANY):
            writer.put(writing, LINE)
        writer.put(writing, "why it ends\n")
        reader = threading.Thread(target=lambda: read.extend(reading))
        reader.start()
        writer.flush(PATIENCE_S, PATIENCE_S)
        writing.close()
        reader.join()
    missing = FIRST + MANY + 2 - len(read)
    assert missing > FIRST
    assert read == [
        *[LINE] * FIRST,
        f"millrace: {missing} lines are missing here, since nobody read those before them\n",
        *[LINE] * (MANY - missing),
        "why it ends\n",
    ]
    assert WAITING_CHARACTERS - len(LINE) < len("".join(read)) - len(read[FIRST]) <= WAITING_CHARACTERS


def wait_for_a_piece(writer: Writer) -> None:
    with writer._changed:
        assert writer._changed.wait_for(lambda: writer._taken, PATIENCE_S)


def test_a_flush_waits_for_no_reader() -> None:
    writer = Writer()
    with pipe() as (reading, writing):
        writer.put(writing, LINE * (1 + HELD // len(LINE)))
        writer.flush(0.01)
        reading.close()
        writer.flush(PATIENCE_S, PATIENCE_S)  # the thread has left the pipe before it is closed
        assert os.readlink(f"/proc/self/fd/{writing.fileno()}") == os.devnull


@pytest.mark.parametrize(
    ("pieces", "every_s", "ended", "left"),
    [(4, 0.75, 3.0, 0), (4, 1.5, PAUSE_S, 4), (1000, 0.25, FLUSH_S, 1000 - FLUSH_S / 0.25)],
)
def test_a_flush_waits_as_long_as_somebody_reads_and_not_for_ever(
    pieces: int, every_s: float, ended: float, left: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer, now = Writer(), 0.0
    writer._size = pieces

    def wait_for(predicate: Callable[[], bool], seconds: float) -> bool:
        """Let a reader take a piece if it does within these seconds."""
        nonlocal now
        now += min(seconds, every_s)
        if every_s <= seconds:
            writer._taken += 1
            writer._size -= 1
        return predicate()

    monkeypatch.setattr(writer._changed, "wait_for", wait_for)
    monkeypatch.setattr("cli.output.monotonic", lambda: now)
    writer.flush()
    assert (now, writer._size) == (ended, left)


@pytest.mark.parametrize("write", [write, _write_past_buffer])
def test_a_full_disk_costs_lines_and_no_stream(write: Callable[[TextIO, str], None]) -> None:
    with open("/dev/full", "w") as full:
        write(full, "lost")
        assert os.readlink(f"/proc/self/fd/{full.fileno()}") == "/dev/full"
        silence(full)


def test_where_there_is_no_stream_nothing_is_written() -> None:
    write(None, "lost")
    Writer().put(None, "lost")


def test_what_a_terminal_cannot_show_is_escaped() -> None:
    reader, writer = os.pipe()
    with os.fdopen(reader) as reading:
        with os.fdopen(writer, "w", encoding="ascii") as writing:
            _write_past_buffer(writing, "Modell f\u00fcr \u6c34\n")
        assert reading.read() == "Modell f\\xfcr \\u6c34\n"
