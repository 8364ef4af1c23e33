"""Loop of a decoder process: one task at a time, under limits of memory and of CPU time that the kernel enforces.

Whatever a library raises about a file is a refusal of that file. If the process dies of a file instead, only it dies.
"""

import gc
import os
import traceback

from services.mm_encoder.decoding import shared_memory
from services.mm_encoder.decoding.messages import (
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
from shared.workers.link import Link, give_way, limit_memory, limit_time, lower_priority

NICE = 5  # beside all else that a machine runs: a quarter of a core that others want, too


def run(link: Link) -> None:
    """Work until the parent closes its end of the link."""
    received = link.receive()
    assert received is not None
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
        link.send(to_encoder.encode(_answer(processor, task, received[1], setup.memory_bytes)))


def _answer(processor: Processor, task: Task, fds: list[int], memory_bytes: int) -> Reply:
    """Do one task, and close its descriptors."""
    try:
        limit_time(task.cpu_s)
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
