"""Queue of step outputs from the model's thread to the tokens streams: in order, none lost while the process lives."""

import asyncio
import threading
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache

from redis.asyncio import Redis

from services.engine.loop.step_output import End, StepOutput
from shared.bus.keys import Keys
from shared.bus.retry import retry_until_available
from shared.bus.streams import LogWriter
from shared.crash_points import crash_point
from shared.messages import Tokens

LEAD = 64  # steps the model may be ahead of Redis before it waits

OnEnded = Callable[[Sequence[End]], Awaitable[None]]
OnBegun = Callable[[], None]


class Outbox:
    """Queue whose `put` belongs to the model's thread, started after `open`; all else runs on the event loop."""

    def __init__(
        self,
        redis: Redis,
        keys: Keys,
        on_ended: OnEnded,
        on_begun: OnBegun = lambda: None,
        waiting: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> None:
        """Make one that is not open. The model's thread waits for Redis inside `waiting`."""
        self._log = cache(lambda shard: LogWriter(redis, keys.tokens(shard)))
        self._on_ended = on_ended
        self._on_begun = on_begun
        self._waiting = waiting
        self._queue: asyncio.Queue[StepOutput] = asyncio.Queue()
        self._room = threading.Semaphore(LEAD)
        self._closed = False

    def open(self) -> None:
        """Bind to the running event loop."""
        self._loop = asyncio.get_running_loop()

    def put(self, step_output: StepOutput) -> None:
        """Queue a step output; block while Redis is LEAD steps behind (back-pressure). Does nothing after `close`."""
        if not self._room.acquire(blocking=False):
            with self._waiting():
                self._room.acquire()
        if not self._closed:
            self._loop.call_soon_threadsafe(self._queue.put_nowait, step_output)

    def close(self) -> None:
        """Release a thread that is blocked in `put`."""
        self._closed = True
        self._room.release(LEAD)

    async def run(self) -> None:
        """Send until cancelled. `on_begun` is called when Begins are in the stream, `on_ended` for a request once its
        Finish is."""
        while True:
            step_output = await self._queue.get()
            messages = step_output.messages()
            # One XADD a shard; shards have different readers, so only the order within each matters.
            await asyncio.gather(*(self._send(shard, message) for shard, message in messages.items()))
            if step_output.begins:
                self._on_begun()
            if step_output.ended:
                await self._on_ended(step_output.ended)
            self._room.release()

    async def _send(self, shard: int, message: Tokens) -> None:
        crash_point("engine.tokens.before")
        await retry_until_available("tokens", lambda: self._log(shard).send(message))
        crash_point("engine.tokens.after")
