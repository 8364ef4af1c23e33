"""Work on one batch, from wherever another gateway may have left it, to its end."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

import msgspec
from prometheus_client import Counter

from services.gateway.batches import batch as states
from services.gateway.batches.batch import Batch
from services.gateway.batches.files import OUTPUT, FileStore
from services.gateway.batches.files import About as FileAbout
from services.gateway.batches.lines import (
    MOST_ERRORS,
    Line,
    LineError,
    LineFault,
    LineReader,
    LineSplitter,
    answered,
    unanswered,
)
from services.gateway.batches.requests import AGAIN, LineRequests, Reply
from services.gateway.batches.store import BatchStore, LeaseLostError
from services.gateway.batches.window import Place, Window
from shared import log
from shared.bus.retry import retry_until_available
from shared.crash_points import crash_point
from shared.errors import RequestError

INLINE_BYTES = 64 << 10  # a longer line is decoded in a thread
NO_ROOM_S = 1.0  # until a result for which files have no room is written again
FIRST_WAIT_S, LONGEST_WAIT_S = 0.25, 30.0  # before a request is sent again that was refused for now
CANCEL_PAGE = 500
TIMED_OUT = 504  # the deadline of a line is that of its batch
EXPIRED_TEXT = "This request could not be executed before the completion window expired."

logger = log.logger(__name__)


class RunParts(msgspec.Struct, frozen=True):
    """Everything that work on batches needs."""

    store: BatchStore
    files: FileStore
    requests: LineRequests
    slots: asyncio.Semaphore  # requests of all batches that run at a time
    window: int  # lines of one batch that have begun, those included that wait to be sent again
    lines: Counter  # by outcome


class BatchRun:
    """Work on a batch whose lease this gateway holds."""

    def __init__(self, parts: RunParts, batch: Batch) -> None:
        self._store = parts.store
        self._files = parts.files
        self._requests = parts.requests
        self._slots = parts.slots
        self._window = Window(parts.window)
        self._count = parts.lines
        self._batch = batch
        self._about = batch.about
        self._has_room = asyncio.Event()  # files have, as far as is known
        self._has_room.set()
        self._again = asyncio.Lock()  # of lines whose result was given up
        self._cancelling = asyncio.Event()
        self._errors: list[LineError] = []  # why the batch has failed
        self._is_over = False  # its end is being written, and with it goes the lease

    async def run(self) -> None:
        """Bring the batch to its end.

        Raises:
            LeaseLostError: another gateway works on it.
            RedisError: Redis refuses what is asked, and no waiting ends that.
        """
        working, keeping = asyncio.create_task(self._work()), asyncio.create_task(self._keep_lease())
        try:
            await asyncio.wait([working, keeping], return_when=asyncio.FIRST_COMPLETED)
            if not working.done():
                keeping.result()
            await working
        finally:
            await _stop(working, keeping)

    async def _keep_lease(self) -> None:
        while True:
            try:
                status = await retry_until_available("renew a batch", partial(self._store.renew, self._about.id))
            except LeaseLostError:
                if self._is_over:
                    return
                raise
            if status == states.CANCELLING:
                self._cancelling.set()
            await asyncio.sleep(self._store.lease_ms / 3000)

    async def _work(self) -> None:
        if self._batch.status == states.CANCELLING:
            self._cancelling.set()
        end = await self._run_until_end()
        if end == states.COMPLETED and not await self._move(states.FINALIZING):
            end = states.CANCELLED
        if end in (states.CANCELLED, states.EXPIRED):
            await self._cancel_requests()
        if end == states.EXPIRED:
            await self._expire_lines()
        await self._publish()
        self._is_over = True
        if not await self._move(end):  # cancelled meanwhile
            await self._move(states.CANCELLED)
        logger.info("a batch has ended", extra={"batch": self._about.id, "status": end})

    async def _run_until_end(self) -> str:
        """Run lines until all have a result, or the batch is cancelled, or its time is over; return how it ends."""
        if self._batch.status == states.FINALIZING:
            return states.COMPLETED  # also after its time: every line has a result, and no other end may follow
        left_s = self._about.expires_at - time.time()
        if self._cancelling.is_set() or left_s <= 0:
            return states.CANCELLED if self._cancelling.is_set() else states.EXPIRED
        running, cancelling = asyncio.create_task(self._run_lines()), asyncio.create_task(self._cancelling.wait())
        try:
            await asyncio.wait([running, cancelling], timeout=left_s, return_when=asyncio.FIRST_COMPLETED)
            if running.done():
                return running.result()
            return states.CANCELLED if self._cancelling.is_set() else states.EXPIRED
        finally:
            await _stop(running, cancelling)

    # ------------------------------------------------------------------------------------------------ lines

    async def _run_lines(self) -> str:
        if self._batch.status == states.VALIDATING:
            await self._validate()
            if self._errors:
                return states.FAILED
            if not await self._move(states.IN_PROGRESS):
                return states.CANCELLED
        try:
            await self._run_all()
        except ExceptionGroup as group:  # as which a task group raises even a single error
            raise group.exceptions[0] from None
        return states.FAILED if self._errors else states.COMPLETED

    async def _run_all(self) -> None:
        async with asyncio.TaskGroup() as group:
            async for line in self._lines_without_result():
                place = await self._window.enter(len(line.body))
                task = group.create_task(self._run_line(line, place))
                task.add_done_callback(partial(self._leave_window, place))  # also if it is cancelled before it begins

    def _leave_window(self, place: Place, _task: asyncio.Task[None]) -> None:
        self._window.leave(place)

    async def _validate(self) -> None:
        reader = LineReader(self._about.endpoint)
        async for number, raw in self._raw_lines():
            try:
                await _read(reader, number, raw)
            except LineFault as fault:
                self._errors.append(fault.error)
                if len(self._errors) >= MOST_ERRORS:
                    return

    async def _lines_without_result(self) -> AsyncIterator[Line]:
        done = await retry_until_available("read a batch", partial(self._store.done, self._about.id))
        reader = LineReader(self._about.endpoint)
        async for number, raw in self._raw_lines():
            if _has_bit(done, number):
                continue
            with contextlib.suppress(LineFault):  # of a batch that ends before it was validated
                yield await _read(reader, number, raw)

    async def _raw_lines(self) -> AsyncIterator[tuple[int, bytes]]:
        """Yield the lines of the input; a batch whose input is gone has failed."""
        splitter = LineSplitter(self._files.limits.line_bytes)
        try:
            async for chunk in self._files.chunks(self._about.input_file_id):
                for each in splitter.feed(chunk):
                    yield each
            for each in splitter.end():
                yield each
        except RequestError as error:
            self._errors.append(LineError("input_file_not_found", error.failure.message, param="input_file_id"))

    async def _run_line(self, line: Line, place: Place) -> None:
        try:
            if not await self._ask_and_keep(line, place):
                async with self._again:  # one at a time: each asks anew, and room for one is no room for all
                    while not await self._ask_and_keep(line, place):
                        pass
        except LeaseLostError:
            return  # which `_keep_lease` is about to learn, too
        forget = partial(self._requests.forget, self._about, line.number)
        await retry_until_available("shorten the life of an answer", forget)

    async def _ask_and_keep(self, line: Line, place: Place) -> bool:
        """Return False if the result was given up, since neither files nor memory have room for it.

        Its answer is kept under the line's key: who asks again gets it.
        """
        reply = await self._ask(line)
        is_good = 200 <= reply.status < 300
        result = answered(self._about.id, line, reply.status, reply.request_id, reply.body)
        return await self._keep(line.number, states.COMPLETED if is_good else states.FAILED, result, place)

    async def _ask(self, line: Line) -> Reply:
        """Return the answer to a line; what is refused for now is sent again."""
        wait_s = FIRST_WAIT_S
        while (reply := await self._ask_once(line)).status in (*AGAIN, TIMED_OUT):
            if reply.status == TIMED_OUT:
                await asyncio.Event().wait()  # until the batch expires, in a moment
            await asyncio.sleep(min(max(wait_s, reply.retry_s), LONGEST_WAIT_S))
            wait_s *= 2
        return reply

    async def _ask_once(self, line: Line) -> Reply:
        while True:
            await self._has_room.wait()
            async with self._slots:  # not while it waits: a tenant at its limit must not keep others' batches waiting
                if self._has_room.is_set():
                    return await self._requests.ask(self._about, line)

    async def _keep(self, number: int, counter: str, result: bytes, place: Place) -> bool:
        """Keep a result, and wait until files have room for it; return False if too many wait already."""
        while not await self._finish_line(number, counter, result):
            if self._has_room.is_set():
                fields = {"batch": self._about.id, "line": number}
                logger.warning("no room in files for a result; the batch waits until there is some", extra=fields)
            self._has_room.clear()
            if not place.result and not self._window.hold(place, len(result)):
                return False
            await asyncio.sleep(NO_ROOM_S)
        # In one step: a line that is refused from now on holds its result and tries again, as somebody must.
        self._window.let_go(place)
        self._has_room.set()
        return True

    async def _finish_line(self, number: int, counter: str, result: bytes) -> bool:
        """Keep a result; return False if files have no room for it."""
        write = partial(self._store.finish_line, self._about, number, counter, result)
        crash_point("gateway.batch_result.before")
        kept = await retry_until_available("keep the result of a line", write)
        crash_point("gateway.batch_result.after")
        if kept:
            self._count.labels(counter).inc()
        return kept

    # ------------------------------------------------------------------------------------------------ the end

    async def _cancel_requests(self) -> None:
        """Cancel the requests of lines that have no result; also those that another gateway has sent."""
        numbers: list[int] = []
        async for line in self._lines_without_result():
            numbers.append(line.number)
            if len(numbers) == CANCEL_PAGE:
                await self._requests.cancel(self._about, numbers)
                numbers.clear()
        crash_point("gateway.batch_cancel.before")
        await self._requests.cancel(self._about, numbers)
        crash_point("gateway.batch_cancel.after")

    async def _expire_lines(self) -> None:
        """Say of each line that it has no answer, as long as files have room for that: nothing waits any more."""
        async for line in self._lines_without_result():
            result = unanswered(self._about.id, line, "batch_expired", EXPIRED_TEXT)
            if not await self._finish_line(line.number, states.EXPIRED, result):
                fields = {"batch": self._about.id, "line": line.number}
                logger.warning("no room in files for lines that have expired; they are left out", extra=fields)
                return

    async def _publish(self) -> None:
        """Let the owner see the files of output and errors, those that have a line."""
        about = self._about
        for name, file_id in (("output", about.output_file_id), ("error", about.error_file_id)):
            size = await retry_until_available("read a file", partial(self._files.size, file_id))
            if size is None:
                continue
            now = int(time.time())
            filename = f"{about.id}_{name}.jsonl"
            file = FileAbout(file_id, about.owner, filename, OUTPUT, size, 0, now, now + about.output_keep_s)
            crash_point("gateway.batch_publish.before")
            await retry_until_available("publish a file", partial(self._files.publish, file))
            crash_point("gateway.batch_publish.after")

    async def _move(self, status: str) -> bool:
        keep_s = self._files.limits.keep_s if status in states.ENDS else 0
        move = partial(self._store.move, self._about.id, status, self._errors, keep_s)
        crash_point("gateway.batch_status.before")
        moved = await retry_until_available("write the status of a batch", move)
        crash_point("gateway.batch_status.after")
        return moved


async def _read(reader: LineReader, number: int, raw: bytes) -> Line:
    if len(raw) <= INLINE_BYTES:
        return reader.read(number, raw)
    return await asyncio.to_thread(reader.read, number, raw)


async def _stop(*tasks: asyncio.Task[Any]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _has_bit(bitmap: bytes, number: int) -> bool:
    """Return a bit as Redis counts them."""
    at, bit = divmod(number, 8)
    return at < len(bitmap) and bool(bitmap[at] & (0x80 >> bit))
