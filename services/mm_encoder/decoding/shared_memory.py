"""Memory without a name that two processes see through a descriptor, gone when both have let go of it.

On Linux it is no file and not bound by the size of /dev/shm, which is 64 MB in a container.
"""

import mmap
import os
import sys
import tempfile

import numpy as np
from numpy.typing import NDArray


def create(size: int) -> int:
    """Return the descriptor of `size` bytes of zeros, which the caller closes."""
    fd = os.memfd_create("millrace-media") if sys.platform == "linux" else _unlinked_file()
    os.truncate(fd, size)
    return fd


def create_with(data: bytes) -> int:
    """Return the descriptor of a copy of `data`, which the caller closes."""
    fd = create(len(data))
    view = memoryview(data)
    while view:
        view = view[os.pwrite(fd, view, len(data) - len(view)) :]
    return fd


def read(fd: int, size: int) -> bytes:
    """Return a copy of all `size` bytes."""
    with mmap.mmap(fd, size, access=mmap.ACCESS_READ) as shared:
        return shared[:]


def as_rows(fd: int, shape: tuple[int, int]) -> NDArray[np.uint8]:
    """Return the memory as an array, which stays when the descriptor is closed."""
    return np.frombuffer(mmap.mmap(fd, shape[0] * shape[1]), np.uint8).reshape(shape)


def _unlinked_file() -> int:
    fd, path = tempfile.mkstemp()
    os.unlink(path)
    return fd
