"""Loop of a decoder process: one task at a time, under limits of memory and of CPU time that the kernel enforces.

Whatever a library raises about a file is a refusal of that file. If the process dies of a file instead, only it dies.
"""

import contextlib
import gc
import os
import resource
import socket
import time
import traceback
from pathlib import Path

from services.mm_encoder.decoding import shared_memory
from services.mm_encoder.decoding.messages import (
    LENGTH,
    Filled,
    FillTask,
    PlanTask,
    Ready,
    Refused,
    Reply,
    Setup,
    Task,
    from_encoder,
    to_encoder,
)
from services.mm_encoder.media.processor import Processor
from services.mm_encoder.media.refusal import over_limit, refuse
from shared.errors import RequestError


class Worker:
    """Processor of tasks from a socket."""

    def __init__(self, link: socket.socket) -> None:
        self._link = link

    def run(self) -> None:
        """Work until the other end closes the socket."""
        setup = self._receive()[0]
        assert isinstance(setup, Setup)
        _limit_memory(setup.memory_bytes)
        processor = Processor(setup.settings, setup.limits, setup.vision, setup.font, own_times=setup.own_times)
        gc.freeze()  # the collector then looks at what tasks make alone
        self._send(Ready())
        while (received := self._receive_or_end()) is not None:
            task, fds = received
            assert not isinstance(task, Setup)
            self._send(_answer(processor, task, fds, setup.memory_bytes))

    def _receive_or_end(self) -> tuple[Setup | Task, list[int]] | None:
        with contextlib.suppress(EOFError, ConnectionError):
            return self._receive()
        return None

    def _receive(self) -> tuple[Setup | Task, list[int]]:
        head, fds, _, _ = socket.recv_fds(self._link, LENGTH.size, 2)
        head += self._read(LENGTH.size - len(head))
        return from_encoder.decode(self._read(*LENGTH.unpack(head))), fds

    def _read(self, size: int) -> bytes:
        body = bytearray()
        while len(body) < size:
            part = self._link.recv(size - len(body))
            if not part:
                raise EOFError
            body += part
        return bytes(body)

    def _send(self, reply: Reply) -> None:
        body = to_encoder.encode(reply)
        self._link.sendall(LENGTH.pack(len(body)) + body)


def _answer(processor: Processor, task: Task, fds: list[int], memory_bytes: int) -> Reply:
    """Do one task, and close its descriptors."""
    try:
        _limit_time(task.cpu_s)
        return _work(processor, task, fds)
    except RequestError as error:
        return Refused(error.failure)
    except MemoryError:
        return Refused(over_limit("The memory to decode it", "decoder_memory_bytes", memory_bytes).failure)
    except Exception:  # libraries raise anything on hostile bytes
        return Refused(refuse("The file is broken and cannot be decoded.").failure, traceback.format_exc())
    finally:
        for fd in fds:
            os.close(fd)


def _work(processor: Processor, task: Task, fds: list[int]) -> Reply:
    data = shared_memory.read(fds[0], task.size) if task.size else b""
    if isinstance(task, PlanTask):
        return processor.plan(task.media, data)
    assert isinstance(task, FillTask)
    return Filled(processor.fill(task.plan, data, shared_memory.as_rows(fds[1], task.plan.rows)))


def _limit_memory(memory_bytes: int) -> None:
    """Bound the memory of this process alone: RLIMIT_DATA leaves out what is shared and what is only reserved.

    macOS takes the limit and does not keep it. On Linux the process is also the first to go if the machine has too
    little memory, since its task can be done again.
    """
    _, most = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (_at_most(memory_bytes, most), most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(OSError):  # not on macOS
        Path("/proc/self/oom_score_adj").write_text("1000")


def _limit_time(cpu_s: int) -> None:
    """Let the kernel end this process when it has computed for `cpu_s` seconds from now, rounded up."""
    _, most = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (_at_most(int(time.process_time()) + 1 + cpu_s, most), most))


def _at_most(wanted: int, most: int) -> int:
    return wanted if most == resource.RLIM_INFINITY else min(wanted, most)
