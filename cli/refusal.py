"""A Redis that takes no writes, as a person is told of it: streams stand still, and nothing else says why."""

import asyncio
import contextlib
import time
from collections.abc import Callable
from pathlib import Path

from redis.asyncio import Redis
from redis.exceptions import ConnectionError, RedisError, TimeoutError

from shared.bus.keys import Keys
from shared.redis_errors import Action, action_for


async def refusal(redis: Redis, keys: Keys) -> str:
    """Return Redis's error on a write that changes nothing; "" if it takes the write, or if waiting would not end the
    error.

    Raises:
        ConnectionError, TimeoutError: Redis does not answer.
    """
    try:
        # No request has this id, and XX replaces what is there: nothing. A Redis of full memory refuses this; not DEL.
        await redis.set(keys.request(""), "", xx=True)
    except (ConnectionError, TimeoutError):
        raise
    except RedisError as error:
        return "" if action_for(error) is Action.END else str(error)
    return ""


class Refusals:
    """Reports, once each, that Redis takes no writes and that it takes them again."""

    def __init__(self, report: Callable[[str], None], data: Path | None) -> None:
        """
        Args:
            data: where our own Redis keeps its data; None if it is somebody else's.
        """
        self._report = report
        self._where = f" (its data are in {data})" if data else ""
        self.reason = ""  # as of the last look
        self._since = self._seen = 0.0  # when it was first seen, and last

    async def look(self, redis: Redis, keys: Keys) -> None:
        """Ask, and report a change.

        Raises:
            ConnectionError, TimeoutError: Redis does not answer, and nothing is known.
        """
        before, self.reason = self.reason, await refusal(redis, keys)
        self._seen = time.monotonic()
        if self.reason and not before:
            self._since = self._seen
            self._report(f"redis takes no writes, and requests stand still until it does: {self.reason}{self._where}")
        elif before and not self.reason:
            self._report("redis takes writes again")

    @property
    def lasting_s(self) -> float:
        """Return for how long Redis has refused, up to the last look that it answered."""
        return self._seen - self._since if self.reason else 0.0

    async def wait_until_lasting(self, redis: Redis, keys: Keys, seconds: float, poll_s: float) -> None:
        """Look until Redis has refused for so long, as of a look that it answers."""
        while True:
            with contextlib.suppress(RedisError):
                await self.look(redis, keys)
                if self.lasting_s >= seconds:
                    return
            await asyncio.sleep(poll_s)

    def explain(self) -> list[str]:
        """Return the lines that say, at an end, why requests were not answered."""
        why = f"requests could not be ended, as redis took no writes: {self.reason}{self._where}"
        return [why] if self.reason else []
