"""Worker's end of the socket to the process that started it, and the limits that the kernel sets it.

Messages are bytes after their length. A message may bring descriptors, which the receiver closes.
"""

import contextlib
import os
import resource
import signal
import socket
import struct
import time
from pathlib import Path

LENGTH = struct.Struct("!I")  # of the message, before it
MAX_FDS = 2


class Link:
    """Socket of a worker, one message at a time."""

    def __init__(self, fd: int) -> None:
        """Open our end. An interrupt from a terminal is for the parent, which drains first."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        self._socket = socket.socket(fileno=fd)

    def receive(self) -> tuple[bytes, list[int]] | None:
        """Return the next message and its descriptors; None once the parent has closed its end."""
        with contextlib.suppress(EOFError, ConnectionError):
            head, fds, _, _ = socket.recv_fds(self._socket, LENGTH.size, MAX_FDS)
            head += self._read(LENGTH.size - len(head))
            return self._read(*LENGTH.unpack(head)), fds
        return None

    def send(self, body: bytes) -> None:
        self._socket.sendall(LENGTH.pack(len(body)) + body)

    def _read(self, size: int) -> bytes:
        body = bytearray()
        while len(body) < size:
            part = self._socket.recv(size - len(body))
            if not part:
                raise EOFError
            body += part
        return bytes(body)


def limit_memory(memory_bytes: int) -> None:
    """Bound the memory of this process alone: RLIMIT_DATA leaves out what is shared and what is only reserved.

    macOS takes the limit and does not keep it.
    """
    _, most = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (_at_most(memory_bytes, most), most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def lower_priority(nice: int) -> None:
    """Let this process have the processor after others that want it, by as much as `nice` says.

    Where each session has a share of the processor of its own (autogroup: desktops), what counts is the session's
    priority. So it gets a session, too.
    """
    with contextlib.suppress(PermissionError):  # it has one
        os.setsid()
    os.nice(nice)
    with contextlib.suppress(OSError):  # not on macOS, or where it is turned off
        Path("/proc/self/autogroup").write_text(str(nice))


def give_way() -> None:
    """Let this process, and those it forks, be the first to go if the machine has too little memory: others take over
    its task."""
    with contextlib.suppress(OSError):  # not on macOS
        Path("/proc/self/oom_score_adj").write_text("1000")


def limit_time(cpu_s: int) -> None:
    """Let the kernel end this process when it has computed for `cpu_s` seconds from now, rounded up."""
    _, most = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (_at_most(int(time.process_time()) + 1 + cpu_s, most), most))


def _at_most(wanted: int, most: int) -> int:
    return wanted if most == resource.RLIM_INFINITY else min(wanted, most)
