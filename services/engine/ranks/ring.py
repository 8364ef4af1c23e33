"""Ring of bytes in memory that several processes see: one writes, each of the others reads all of it.

The bytes go through the memory, once for all readers. That there are some goes through a socket to each reader, which
sleeps until then, and on which it says that it has read them. So neither waits by looking, the sockets order what is in
the memory, and the end of either process is seen by the other as the end of the socket.
"""

import contextlib
import mmap
import select
import socket
import struct
from collections import deque
from collections.abc import Sequence

_HEAD = struct.Struct("<qq")  # bytes of a chunk; bytes of the message that follow it
_READ = b"\0"

Buffer = bytes | bytearray | memoryview


class Writer:
    """Writing end. A message longer than the ring waits for its readers on the way."""

    def __init__(self, memory: mmap.mmap, links: Sequence[socket.socket]) -> None:
        self._memory = memoryview(memory)
        self._readers = [_Reader(link) for link in links]
        self._written = 0

    def write(self, parts: Sequence[Buffer]) -> None:
        """Send the parts as one message.

        Raises:
            OSError: a reader has ended.
        """
        views = [memoryview(part).cast("B") for part in parts if len(part)]
        left = sum(map(len, views))
        most = len(self._memory) // 2
        while left:
            size = min(left, most)
            left -= size
            for reader in self._readers:
                reader.make_room(size, len(self._memory))
            views = self._put(views, size)
            for reader in self._readers:
                reader.announce(size, left)

    def _put(self, views: list[memoryview], size: int) -> list[memoryview]:
        """Copy the first `size` bytes; return what is left of the views."""
        while size:
            at = self._written % len(self._memory)
            count = min(len(views[0]), size, len(self._memory) - at)
            self._memory[at : at + count] = views[0][:count]
            self._written += count
            size -= count
            views[0] = views[0][count:]
            if not views[0]:
                views = views[1:]
        return views


class _Reader:
    """A reader, as the writer knows it."""

    def __init__(self, link: socket.socket) -> None:
        self._link = link
        # MSG_DONTWAIT would wait on a socket with a timeout.
        self._said = select.poll()
        self._said.register(link, select.POLLIN)
        self._unread: deque[int] = deque()
        self._used = 0

    def announce(self, size: int, left: int) -> None:
        self._link.sendall(_HEAD.pack(size, left))
        self._unread.append(size)
        self._used += size

    def make_room(self, size: int, room: int) -> None:
        """Note what was read; wait until `size` bytes are free."""
        if self._said.poll(0):
            self._note()
        while self._used + size > room:
            self._note()

    def _note(self) -> None:
        read = self._link.recv(4096)
        if not read:
            raise BrokenPipeError("the reader has ended")
        for _ in read:
            self._used -= self._unread.popleft()


class Reader:
    """Reading end."""

    def __init__(self, memory: mmap.mmap, link: socket.socket) -> None:
        self._memory = memoryview(memory)
        self._link = link
        self._at = 0

    def read(self) -> bytearray | None:
        """Return the next message; None once the writer has ended."""
        try:
            return self._read()
        except (EOFError, ConnectionError):
            return None

    def _read(self) -> bytearray:
        size, left = self._head()
        message = bytearray(size + left)
        filled = 0
        while True:
            self._take(memoryview(message)[filled : filled + size])
            with contextlib.suppress(ConnectionError):  # a writer that has ended needs no room
                self._link.sendall(_READ)
            filled += size
            if not left:
                return message
            size, left = self._head()

    def _head(self) -> tuple[int, int]:
        head = b""
        while len(head) < _HEAD.size:
            part = self._link.recv(_HEAD.size - len(head))
            if not part:
                raise EOFError
            head += part
        size, left = _HEAD.unpack(head)
        return size, left

    def _take(self, target: memoryview) -> None:
        room = len(self._memory)
        first = min(len(target), room - self._at)
        target[:first] = self._memory[self._at : self._at + first]
        target[first:] = self._memory[: len(target) - first]
        self._at = (self._at + len(target)) % room
