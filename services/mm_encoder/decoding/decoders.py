"""Pool of decoder processes, in two lanes, so that no file holds up other clients' files.

A task begins in the quick lane, where it may compute for `SLICE_S`. What takes longer is done from its start in the
slow lane, and what is known to take longer begins there. Each lane has its own processes. So files that take long, made
to or not, wait for each other only.
"""

import asyncio
import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NoReturn

import msgspec

from services.mm_encoder.decoding.messages import (
    Filled,
    FillTask,
    PlanTask,
    Refused,
    Reply,
    Setup,
    Task,
    from_decoder,
    to_decoder,
)
from services.mm_encoder.decoding.shared_memory import SharedMemory
from services.mm_encoder.decoding.small_images import SmallImages
from services.mm_encoder.media.patches import Patches
from services.mm_encoder.media.processor import ImagePlan, VideoPlan
from services.mm_encoder.media.refusal import over_limit, refuse
from services.mm_encoder.metrics import Metrics
from shared.errors import RequestError, internal
from shared.log import logger
from shared.messages import Media, MediaKind
from shared.workers.pool import NoWorkerError, WorkerPool
from shared.workers.process import DiedError, TooSlowError

MODULE = "services.mm_encoder.decoding"
SLICE_S = 2  # of computing, in the quick lane
QUICK_WORK = 200_000_000  # pixels to decode; what has more begins in the slow lane
FASTEST = 1_500_000_000  # pixels a second; decoders of real pictures make 20 to 600 million
SMALL_BYTES = 1 << 20  # copied, and hashed, faster than a thread is found for it
# By default glibc gives a picture's memory back after each, and takes it anew page by page: 9,700 page faults at 1080p,
# a third of the time. So decoders keep up to 128 MB.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(32 << 20), "MALLOC_TRIM_THRESHOLD_": str(128 << 20)}

_log = logger(__name__)


@dataclass(frozen=True, slots=True)
class TimeLimit:
    """Seconds of computing that a file may take, and the setting's name."""

    setting: str
    cpu_s: int


class Decoders:
    """Decoding of images and videos in other processes: `plan`, then `patches`; or, of small images, `read_small`."""

    def __init__(
        self,
        setup: Setup,
        environ: Mapping[str, str],
        *,
        processes: int,
        limits: Mapping[MediaKind, TimeLimit],
        metrics: Metrics,
    ) -> None:
        """`processes` is the most in each lane."""
        first = to_decoder.encode(setup)
        environ = {**environ, **MALLOC}
        self._quick = WorkerPool(MODULE, first, environ, processes)
        self._slow = WorkerPool(MODULE, first, environ, processes)
        self._memory = SharedMemory()
        self._small = SmallImages(self._quick, self._memory, processes)
        self._limits = limits
        self._metrics = metrics

    async def start(self) -> None:
        """Start a process, so that the first file need not wait for it. If none starts, that file tries again."""
        try:
            await self._quick.start_one()
        except NoWorkerError as error:
            _log.error("no decoder process could be started", extra={"error": str(error)})

    async def plan(self, media: Media, data: bytes) -> ImagePlan | VideoPlan:
        """Read the headers of `media`.

        Raises:
            RequestError: the file cannot be used, or is over a limit; 503, there is no process or memory to decode it.
        """
        limit = self._limits[media.kind]
        with _no_resources_fail_the_request():
            reply = await self._with_file(PlanTask(len(data), limit.cpu_s, media), limit, data)
        assert isinstance(reply, ImagePlan | VideoPlan)
        return reply

    async def patches(self, plan: ImagePlan | VideoPlan, data: bytes) -> Patches:
        """Decode the file of `plan`.

        Raises:
            RequestError: as `plan`.
        """
        limit = self._limits["image" if isinstance(plan, ImagePlan) else "video"]
        if plan.work > limit.cpu_s * FASTEST:
            raise _too_slow(limit)
        with _no_resources_fail_the_request():
            block = self._memory.take(plan.rows[0] * plan.rows[1])
            reply = await self._with_file(FillTask(len(data), limit.cpu_s, plan), limit, data, block.fd)
            rows = self._memory.as_rows(block, plan.rows)
        assert isinstance(reply, Filled)
        return Patches(rows, reply.grid)

    async def read_small(self, media: Media, data: bytes) -> tuple[ImagePlan | VideoPlan, Patches | None]:
        """Read the header of a small image, and decode it as well if it has few pixels, too.

        Raises:
            RequestError: as `plan`.
        """
        with _no_resources_fail_the_request():
            reply = await self._small.read(media, data)
        if reply is None:
            return await self.plan(media, data), None
        if isinstance(reply, Refused):
            _raise(reply)
        return reply

    async def close(self) -> None:
        """End all processes. Nobody waits for a task any more."""
        await self._small.close()
        await self._quick.close()
        await self._slow.close()

    async def _with_file(self, task: Task, limit: TimeLimit, data: bytes, *others: int) -> Reply:
        """Do a task with the file in memory that is kept for the next, unless the task fails: its process may live."""
        block = self._memory.take(max(1, len(data)))
        if len(data) <= SMALL_BYTES:
            block.write(data)
        else:
            await asyncio.to_thread(block.write, data)
        reply = await self._in_time(task, limit, [block.fd, *others])
        if isinstance(reply, Refused):
            _raise(reply)
        self._memory.give_back(block)
        return reply

    async def _in_time(self, task: Task, limit: TimeLimit, fds: list[int]) -> Reply:
        try:
            return await self._through_lanes(task, fds)
        except TooSlowError as error:
            self._metrics.count_decoder_end("time")
            raise _too_slow(limit) from error
        except DiedError as error:
            self._metrics.count_decoder_end("crash")
            raise refuse("The file makes its decoder crash.") from error

    async def _through_lanes(self, task: Task, fds: list[int]) -> Reply:
        if isinstance(task, FillTask) and task.plan.work > QUICK_WORK:
            return await _call(self._slow, task, fds)
        try:
            return await _call(self._quick, msgspec.structs.replace(task, cpu_s=min(SLICE_S, task.cpu_s)), fds)
        except TooSlowError:
            return await _call(self._slow, task, fds)


async def _call(lane: WorkerPool, task: Task, fds: list[int]) -> Reply:
    reply: Reply = from_decoder.decode(await lane.call(to_decoder.encode(task), fds))
    return reply


@contextlib.contextmanager
def _no_resources_fail_the_request() -> Iterator[None]:
    """
    Raises:
        RequestError: 503, no process could be had, or no file for the memory that it shares with us.
    """
    try:
        yield
    except (NoWorkerError, OSError) as error:
        _log.error("media cannot be decoded now", extra={"error": str(error)})
        raise internal("The server has no process or file to decode media with now.", "overloaded", 503) from error


def _too_slow(limit: TimeLimit) -> RequestError:
    return over_limit("The time to decode it, in seconds of computing,", limit.setting, limit.cpu_s)


def _raise(reply: Refused) -> NoReturn:
    if reply.cause is not None:
        _log.warning("media refused for an unexpected error", extra={"cause": reply.cause})
    raise RequestError(reply.failure)
