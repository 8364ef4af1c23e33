"""Waiting for Redis instead of failing: what a replica has in hand is worth more than a quick error."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

from redis.exceptions import ConnectionError, NoScriptError, OutOfMemoryError, ReadOnlyError, TimeoutError

from shared.log import logger

# What a restart or an operator mends. A script is missing where the client has loaded it and Redis was restarted before
# the call.
PASSING = (ConnectionError, TimeoutError, OutOfMemoryError, ReadOnlyError, NoScriptError)
FIRST_DELAY_S = 0.1
LONGEST_DELAY_S = 5.0

T = TypeVar("T")

_log = logger(__name__)


async def retry_until_available(what: str, attempt: Callable[[], Awaitable[T]]) -> T:
    """The result of `attempt`, made again with growing delays for as long as Redis cannot take it.

    The attempt may be carried out more than once: its effect must bear that.
    """
    delay = FIRST_DELAY_S
    while True:
        try:
            return await attempt()
        except PASSING as error:
            _log.warning("Redis cannot serve us; waiting", extra={"what": what, "error": type(error).__name__})
        await asyncio.sleep(delay)
        delay = min(2 * delay, LONGEST_DELAY_S)
