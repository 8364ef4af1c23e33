"""The ring between the ranks, in one process: every reader gets what was written, whatever its size."""

import mmap
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.engine.ranks.ring import Reader, Writer

ROOM = mmap.PAGESIZE


class Ends:
    """A writer and two readers."""

    def __init__(self, stack: ExitStack) -> None:
        memory = mmap.mmap(-1, ROOM)
        pairs = [socket.socketpair() for _ in range(2)]
        self.sockets = [stack.enter_context(end) for pair in pairs for end in pair]
        self.writer = Writer(memory, [ours for ours, _ in pairs])
        self.readers = [Reader(memory, theirs) for _, theirs in pairs]


@pytest.fixture
def ends() -> Iterator[Ends]:
    with ExitStack() as stack:
        yield Ends(stack)


def read_all(reader: Reader, count: int, into: list[bytes]) -> None:
    for _ in range(count):
        message = reader.read()
        assert message is not None
        into.append(bytes(message))


@given(st.lists(st.lists(st.integers(0, 3 * ROOM), min_size=1, max_size=3).filter(any), min_size=1, max_size=6))
def test_every_reader_reads_every_message(sizes: list[list[int]]) -> None:
    messages = [[bytes([i + j + 1]) * size for j, size in enumerate(parts)] for i, parts in enumerate(sizes)]
    with ExitStack() as stack:
        ends = Ends(stack)
        found: list[list[bytes]] = [[], []]
        threads = [
            threading.Thread(target=read_all, args=(reader, len(messages), into))
            for reader, into in zip(ends.readers, found, strict=True)
        ]
        for thread in threads:
            thread.start()
        for parts in messages:
            ends.writer.write(parts)
        for thread in threads:
            thread.join()
        assert found == [[b"".join(parts) for parts in messages]] * 2


def test_a_writer_that_has_ended_is_the_end(ends: Ends) -> None:
    ends.writer.write([b"last"])
    for ours in ends.sockets[::2]:
        ours.close()
    assert ends.readers[0].read() == bytearray(b"last")
    assert ends.readers[0].read() is None


def test_a_reader_that_has_said_nothing_is_not_waited_for_while_there_is_room(ends: Ends) -> None:
    for ours in ends.sockets[::2]:
        ours.settimeout(0.01)  # a wait would be an error
    for _ in range(3):
        ends.writer.write([b"next"])
    assert [ends.readers[0].read() for _ in range(3)] == [bytearray(b"next")] * 3


def test_a_reader_that_has_ended_is_an_error_and_no_wait(ends: Ends) -> None:
    for theirs in ends.sockets[1::2]:
        theirs.close()
    with pytest.raises((BrokenPipeError, ConnectionResetError)):
        ends.writer.write([bytes(3 * ROOM)])
