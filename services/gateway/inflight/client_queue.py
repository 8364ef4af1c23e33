"""Queue of the deltas that a client has not been sent: its task empties it, or a writer takes them as they arrive."""

import asyncio
from collections.abc import Callable, Sequence
from typing import Protocol

from shared.messages import Delta


class TextWriter(Protocol):
    """Writer of one choice's text to a client that has all before it."""

    def write(self, delta: Delta) -> bool:
        """Write a delta without waiting. False if that cannot be, or it is more than text: nothing was written."""


class DirectWriter(Protocol):
    """Writer to a client."""

    def write_now(self, deltas: Sequence[tuple[int, Delta]]) -> bool:
        """Write (choice, delta) without waiting; False if that cannot be, and nothing was written."""

    def text_writer(self, index: int) -> TextWriter:
        """Return the writer of the text of a choice, behind its first delta."""


class ClientQueue:
    """Deltas of all choices of a request, as (choice, delta), between the inbox and the client's task."""

    __slots__ = (
        "_awake",
        "_closed",
        "_counted",
        "_max_pending",
        "_pending",
        "_pending_size",
        "_set_writers",
        "_waiting",
        "_writer",
        "overflowed",
    )

    def __init__(self, max_pending: int, set_writers: Callable[[Sequence[int], DirectWriter | None], None]) -> None:
        """Begin empty.

        `max_pending` bounds the bytes queued for a client that does not read. `set_writers` is called with choices and
        the writer that takes their text from then on; with None, the queue takes all choices' again.
        """
        self.overflowed = asyncio.Event()  # set once more than `max_pending` bytes wait for the client
        self._max_pending = max_pending
        self._set_writers = set_writers
        self._pending: list[tuple[int, Delta]] = []
        self._counted = 0  # of these, the first that are counted in `_pending_size`
        self._pending_size = 0
        self._closed = False
        self._awake = False  # there is something to write, or to look at
        self._waiting: asyncio.Future[None] | None = None  # of the client's task
        self._writer: DirectWriter | None = None  # while the client's task waits

    def __bool__(self) -> bool:
        """True while deltas wait for the client's task."""
        return bool(self._pending)

    async def next_deltas(self, writer: DirectWriter | None = None) -> list[tuple[int, Delta]]:
        """Wait for deltas, and return all since the last call. None may be there after `wake` or `close`.

        `writer` may take deltas meanwhile, except the last ones.
        """
        if not (self._pending or self._awake or self._closed):
            self._waiting = asyncio.get_running_loop().create_future()
            self._writer = writer
            try:
                await self._waiting
            finally:
                self._drop_writer()
        self._awake = False
        deltas, self._pending, self._counted, self._pending_size = self._pending, [], 0, 0
        return deltas

    def put(self, index: int, delta: Delta) -> None:
        """Add a delta of a choice."""
        self._pending.append((index, delta))

    def pass_on(self, last: bool) -> None:
        """Pass on what is there: to the client at once if that needs no waiting, else to its task.

        `last`: the answer ends with it, and the task writes the end.
        """
        if self._writer is not None and not last:
            try:
                if self._writer.write_now(self._pending):
                    self._set_writers([index for index, _ in self._pending], self._writer)
                    self._pending.clear()
                    return
            except Exception as error:
                self.break_off(error)
                return
        self._count_pending()
        self.wake()

    def wake(self) -> None:
        """Wake the client's task. As an asyncio.Event would, which cannot raise an error there."""
        self._awake = True
        self._drop_writer()
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)

    def close(self) -> None:
        """Wake the client's task, now and whenever it asks again: the request has failed."""
        self._closed = True
        self.wake()

    def break_off(self, error: Exception) -> None:
        """Have the client's task raise what writing to the client has raised."""
        self._drop_writer()
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_exception(error)

    def _drop_writer(self) -> None:
        """Have the client's task write what comes next."""
        self._writer = None
        self._set_writers((), None)

    def _count_pending(self) -> None:
        """Count the bytes of what waits for the client's task."""
        for _, delta in self._pending[self._counted :]:
            if self._pending_size > self._max_pending:
                self.overflowed.set()
            self._pending_size += _size(delta)
        self._counted = len(self._pending)


def _size(delta: Delta) -> int:
    """Estimate the bytes of a delta in a stream, beyond its frame: enough that nothing large counts as nothing.

    The prompt's ids are not counted: they come once a choice, and may come for all choices at the same moment.
    """
    size = 64 + len(delta.content) + len(delta.reasoning) + 8 * len(delta.token_ids)
    if delta.tool_calls:
        size += sum(len(call.arguments) for call in delta.tool_calls)
    if delta.logprobs:
        size += 64 * len(delta.logprobs) * (1 + max(len(one.top) for one in delta.logprobs))
    return size
