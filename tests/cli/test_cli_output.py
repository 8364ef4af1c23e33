"""Lines for a reader that may pause, end, or have no room."""

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

import pytest
from machine import PATIENCE_S

from cli.output import WAITING_CHARACTERS, Writer, _write_past_buffer, silence, write

LINE = "x" * 99 + "\n"
FEW = 10
MANY = WAITING_CHARACTERS // len(LINE) + 1  # beyond the limit
HELD = 1 << 16  # of a pipe that nobody reads


@contextmanager
def pipe() -> Iterator[tuple[TextIO, TextIO]]:
    reader, writer = os.pipe()
    with os.fdopen(reader) as reading, os.fdopen(writer, "w") as writing:
        yield reading, writing


@pytest.mark.parametrize("blocking", [True, False])
def test_a_reader_that_pauses_holds_nobody_up_and_is_told_what_it_missed(blocking: bool) -> None:
    writer, read = Writer(), []
    with pipe() as (reading, writing):
        os.set_blocking(writing.fileno(), blocking)
        writer.put(writing, LINE * MANY)  # which a pipe does not hold
        for _ in range(FEW):
            writer.put(writing, LINE)
        reader = threading.Thread(target=lambda: read.extend(reading))
        reader.start()
        writer.flush(PATIENCE_S)
        writer.put(writing, "and on\n")
        writer.flush(PATIENCE_S)
        writing.close()
        reader.join()
    assert read == [LINE] * MANY + [
        f"millrace: {FEW} lines are missing here, since nobody read those before them\n",
        "and on\n",
    ]


def test_a_flush_waits_for_no_reader() -> None:
    writer = Writer()
    with pipe() as (reading, writing):
        writer.put(writing, LINE * (1 + HELD // len(LINE)))
        writer.flush(0.01)
        reading.close()
        writer.flush(PATIENCE_S)  # the thread has left the pipe before it is closed
        assert os.readlink(f"/proc/self/fd/{writing.fileno()}") == os.devnull


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
