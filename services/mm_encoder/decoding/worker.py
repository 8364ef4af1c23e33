"""Loop of a decoder process: one task at a time, under limits of memory and of CPU time that the kernel enforces.

Whatever a library raises about a file is a refusal of that file. If the process dies of a file instead, only it dies.
"""

import contextlib
import faulthandler
import gc
import os
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from services.mm_encoder.decoding import shared_memory
from services.mm_encoder.decoding.messages import (
    Decoded,
    Filled,
    FillTask,
    PlanTask,
    Read,
    Ready,
    Refused,
    Reply,
    Setup,
    SmallTask,
    Task,
    from_encoder,
    to_encoder,
)
from services.mm_encoder.media.processor import ImagePlan, Processor
from services.mm_encoder.media.refusal import over_limit, refuse
from shared.errors import RequestError
from shared.messages import Media
from shared.workers.link import Link, give_way, limit_memory, limit_time, lower_priority

T = TypeVar("T")
RowsFor = Callable[[ImagePlan], NDArray[np.uint8] | None]

NICE = 5  # beside all else that a machine runs: a quarter of a core that others want, too


def run(link: Link) -> None:
    """Work until the parent closes its end of the link."""
    received = link.receive()
    assert received is not None
    faulthandler.enable(os.dup(2))  # tells where a file killed us; what libc says of it is dropped with all else
    setup = from_encoder.decode(received[0])
    assert isinstance(setup, Setup)
    give_way()
    lower_priority(NICE)
    limit_memory(setup.memory_bytes)
    told = (setup.settings, setup.limits, setup.vision, setup.font)
    processor = Processor(*told, own_times=setup.own_times, threads=setup.threads)
    gc.freeze()  # the collector then looks at what tasks make alone
    link.send(to_encoder.encode(Ready()))
    while (received := link.receive()) is not None:
        task = from_encoder.decode(received[0])
        assert not isinstance(task, Setup)
        try:
            limit_time(task.cpu_s)
            with _silent_libraries():
                reply = _answer(processor, task, received[1], setup.memory_bytes)
            link.send(to_encoder.encode(reply))
        finally:
            for fd in received[1]:
                os.close(fd)


@contextlib.contextmanager
def _silent_libraries() -> Iterator[None]:
    """Drop what is written to stderr: libtiff has a line for every line of a broken fax, and Pillow its warnings."""
    before = os.dup(2)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(before, 2)
        os.close(before)


def _answer(processor: Processor, task: Task | SmallTask, fds: list[int], memory_bytes: int) -> Reply:
    if isinstance(task, SmallTask):
        return _read_small(processor, task, fds, memory_bytes)
    return _or_refusal(partial(_work, processor, task, fds), memory_bytes)


def _or_refusal(work: Callable[[], T], memory_bytes: int) -> T | Refused:
    """Return what a file gives, or that it is refused."""
    try:
        return work()
    except RequestError as error:
        return Refused(error.failure)
    except MemoryError:
        return Refused(over_limit("The memory to decode it", "decoder_memory_bytes", memory_bytes).failure)
    except Exception:  # libraries raise anything on hostile bytes
        return Refused(refuse("The file is broken and cannot be decoded.").failure, traceback.format_exc())


def _work(processor: Processor, task: Task, fds: list[int]) -> Reply:
    data = shared_memory.read(fds[0], task.size) if task.size else b""
    if isinstance(task, PlanTask):
        return processor.plan(task.media, data)
    assert isinstance(task, FillTask)
    return Filled(processor.fill(task.plan, data, shared_memory.as_rows(fds[1], task.plan.rows)))


def _read_small(processor: Processor, task: SmallTask, fds: list[int], memory_bytes: int) -> Read:
    """Read one small image after the other."""
    data = shared_memory.read(fds[0], sum(size for size, _ in task.files))
    images: list[Decoded | ImagePlan | Refused] = []
    start, left = 0, task.most_work
    for index, (size, media) in enumerate(task.files):
        rows_for = partial(_rows_within, fds[1], index * task.room, task.room, left)
        read = partial(_read_image, processor, media, data[start : start + size], rows_for)
        images.append(_or_refusal(read, memory_bytes))
        if isinstance(images[-1], Decoded):
            left -= images[-1].plan.work
        start += size
    return Read(images)


def _read_image(processor: Processor, media: Media, data: bytes, rows_for: RowsFor) -> Decoded | ImagePlan:
    plan, grid = processor.read_image(media, data, rows_for)
    return plan if grid is None else Decoded(plan, grid)


def _rows_within(fd: int, start: int, room: int, work: int, plan: ImagePlan) -> NDArray[np.uint8] | None:
    """Return the rows of an image that is decoded with others, if it needs no more room and work."""
    if plan.rows[0] * plan.rows[1] > room or plan.work > work:
        return None
    return shared_memory.as_rows(fd, plan.rows, start)
