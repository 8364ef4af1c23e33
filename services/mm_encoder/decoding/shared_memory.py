"""Memory without a name that two processes see through a descriptor, used again and again by the one that lends it.

On Linux it is no file and not bound by the size of /dev/shm, which is 64 MB in a container. New pages cost more than
what is written to them: the kernel zeroes each, and both processes miss each one by one. So some blocks are kept. What
is in one is what its last user left: whoever takes a block fills all that anybody will read of it.
"""

import asyncio
import contextlib
import mmap
import os
import sys
import tempfile
import weakref

import numpy as np
from numpy.typing import NDArray

KEPT_BYTES, KEPT_BLOCKS = 64 << 20, 64  # that nobody uses; a block holds two descriptors
LEAST_BYTES = 64 << 10
_POPULATE = getattr(mmap, "MAP_POPULATE", 0)  # Linux: all pages at once, instead of one by one when they are missed


class Block:
    """Memory behind a descriptor. Of its bytes only those that were used have pages."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.fd = os.memfd_create("millrace-media") if sys.platform == "linux" else _unlinked_file()
        weakref.finalize(self, os.close, self.fd)
        os.truncate(self.fd, size)
        self._mapped: mmap.mmap | None = None

    def write(self, data: bytes) -> None:
        """Copy `data` to the start."""
        view = memoryview(data)
        while view:
            view = view[os.pwrite(self.fd, view, len(data) - len(view)) :]

    def start(self, size: int) -> NDArray[np.uint8]:
        """Return the first bytes, as our process sees them."""
        if self._mapped is None:
            self._mapped = mmap.mmap(self.fd, self.size)
        return np.frombuffer(self._mapped, np.uint8, size)


class SharedMemory:
    """Blocks to lend, for one event loop. A block that is not given back is gone with the last reference to it."""

    def __init__(self) -> None:
        self._kept: list[Block] = []  # the one given back last is last

    def take(self, size: int) -> Block:
        """Return a block of at least `size` bytes, with anything in them."""
        size = max(LEAST_BYTES, 1 << (size - 1).bit_length())  # so that other pictures of about this size fit, too
        for place in reversed(range(len(self._kept))):
            if self._kept[place].size == size:
                return self._kept.pop(place)
        return Block(size)

    def give_back(self, block: Block) -> None:
        """Keep a block for the next who takes one. No other process may write to it any more."""
        self._kept.append(block)
        while len(self._kept) > KEPT_BLOCKS or sum(block.size for block in self._kept) > KEPT_BYTES:
            del self._kept[0]

    def as_rows(self, block: Block, shape: tuple[int, int]) -> NDArray[np.uint8]:
        """Return the start of a block as `view` does, in rows."""
        return self.view(block, shape[0] * shape[1]).reshape(shape)

    def view(self, block: Block, size: int) -> NDArray[np.uint8]:
        """Return the start of a block as an array, at the end of whose last view the block is given back."""
        flat, loop = block.start(size), asyncio.get_running_loop()

        def give_back() -> None:  # in any thread
            with contextlib.suppress(RuntimeError):  # the loop has been closed
                loop.call_soon_threadsafe(self.give_back, block)

        weakref.finalize(flat, give_back).atexit = False
        return flat


def read(fd: int, size: int) -> bytes:
    """Return a copy of the first `size` bytes."""
    with mmap.mmap(fd, size, flags=mmap.MAP_SHARED | _POPULATE, prot=mmap.PROT_READ) as shared:
        return shared[:]


def as_rows(fd: int, shape: tuple[int, int], start: int = 0) -> NDArray[np.uint8]:
    """Return the bytes from `start`, where a page starts, as an array, which stays when the descriptor is closed."""
    shared = mmap.mmap(fd, shape[0] * shape[1], flags=mmap.MAP_SHARED | _POPULATE, offset=start)
    return np.frombuffer(shared, np.uint8).reshape(shape)


def _unlinked_file() -> int:
    fd, path = tempfile.mkstemp()
    os.unlink(path)
    return fd
