"""Small images, several in one message to a decoder process: for each by itself, messages cost as much as decoding.

Those that wait while a process is free go to it together, so none waits for others to come. If the process dies of them
or takes long, nobody knows of which: each is then done alone (decoders.py), and what it does there is its own. Their
patches are in one block of memory, which is free when the last of them has been encoded.
"""

import asyncio
from collections import deque
from dataclasses import dataclass

from services.mm_encoder.decoding.messages import Decoded, Read, Refused, SmallTask, from_decoder, to_decoder
from services.mm_encoder.decoding.shared_memory import Block, SharedMemory
from services.mm_encoder.media.patches import Patches
from services.mm_encoder.media.processor import ImagePlan
from shared.log import logger
from shared.messages import Media
from shared.workers.pool import WorkerPool
from shared.workers.process import DiedError, TooSlowError

MOST_BYTES = 256 << 10  # of a file
MOST_WORK = 4_000_000  # pixels to decode, of all that go together: a tenth of SLICE_S
ROOM_BYTES = 1 << 20  # for its patches
TOGETHER = 8
SLICE_S = 1  # of computing, for all of them

_log = logger(__name__)

SmallReply = tuple[ImagePlan, Patches | None] | Refused


@dataclass(frozen=True, slots=True, eq=False)
class _Waiting:
    """One image that waits; its reply is None if it has to be done alone."""

    media: Media
    data: bytes
    reply: asyncio.Future[SmallReply | None]


def is_small(media: Media, data: bytes) -> bool:
    """Return True if a file may go with others."""
    return media.kind == "image" and 0 < len(data) <= MOST_BYTES


class SmallImages:
    """Small images on their way to the processes of one lane, of which there are `processes`."""

    def __init__(self, lane: WorkerPool, memory: SharedMemory, processes: int) -> None:
        self._lane = lane
        self._memory = memory
        self._processes = processes
        self._waiting: deque[_Waiting] = deque()
        self._carrying: set[asyncio.Task[None]] = set()
        self._busy = 0  # of these, with images

    async def read(self, media: Media, data: bytes) -> SmallReply | None:
        """Return the plan of an image, with its patches if it was decoded; None: it has to be done alone.

        Raises:
            NoWorkerError, OSError: there is no process or no memory for it.
        """
        waiting = _Waiting(media, data, asyncio.get_running_loop().create_future())
        self._waiting.append(waiting)
        if len(self._carrying) < self._processes:
            task = asyncio.create_task(self._carry())
            self._carrying.add(task)
        return await waiting.reply

    async def close(self) -> None:
        """Stop. Nobody waits for an image any more."""
        tasks = list(self._carrying)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _carry(self) -> None:
        """Carry images to a process until none waits, each time a share for each process that is idle, and for ours."""
        try:
            while some := self._take_some(min(TOGETHER, -(-len(self._waiting) // (self._processes - self._busy)))):
                self._busy += 1
                try:
                    await self._answer(some)
                finally:
                    self._busy -= 1
        finally:  # here and not in a callback, before which another might come to wait, and nobody carry it
            self._carrying.discard(asyncio.current_task())

    async def _answer(self, some: list[_Waiting]) -> None:
        try:
            replies = await self._read_together(some)
        except Exception as error:
            for waiting in some:
                if not waiting.reply.done():
                    waiting.reply.set_exception(error)
            return
        for waiting, reply in zip(some, replies, strict=True):
            if not waiting.reply.done():
                waiting.reply.set_result(reply)

    def _take_some(self, most: int) -> list[_Waiting]:
        """Take images that are still waited for."""
        some: list[_Waiting] = []
        while self._waiting and len(some) < most:
            waiting = self._waiting.popleft()
            if not waiting.reply.done():
                some.append(waiting)
        return some

    async def _read_together(self, some: list[_Waiting]) -> list[SmallReply] | list[None]:
        files = self._memory.take(sum(len(waiting.data) for waiting in some))
        files.write(b"".join(waiting.data for waiting in some))
        rows = self._memory.take(len(some) * ROOM_BYTES)
        told = [(len(waiting.data), waiting.media) for waiting in some]
        task = to_decoder.encode(SmallTask(SLICE_S, told, ROOM_BYTES, MOST_WORK))
        try:
            answer = from_decoder.decode(await self._lane.call(task, [files.fd, rows.fd], twice=False))
        except (DiedError, TooSlowError) as error:
            _log.warning("images that were read together are read alone", extra={"error": str(error)})
            return [None] * len(some)
        assert isinstance(answer, Read)
        self._memory.give_back(files)
        return self._replies(answer, rows)

    def _replies(self, answer: Read, block: Block) -> list[SmallReply]:
        rows = self._memory.view(block, len(answer.images) * ROOM_BYTES)
        replies: list[SmallReply] = []
        for index, image in enumerate(answer.images):
            if isinstance(image, Decoded):
                start, shape = index * ROOM_BYTES, image.plan.rows
                own = rows[start : start + shape[0] * shape[1]].reshape(shape)
                replies.append((image.plan, Patches(own, image.grid)))
            else:
                replies.append(image if isinstance(image, Refused) else (image, None))
        return replies
