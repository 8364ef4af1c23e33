"""Retry for as long as Redis is unavailable: requests in flight are worth more than a quick error."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

from redis.exceptions import RedisError

from shared.log import logger
from shared.redis_errors import Action, action_for, is_wrong_type

FIRST_DELAY_S = 0.1
LONGEST_DELAY_S = 5.0

T = TypeVar("T")

_log = logger(__name__)


async def retry_until_available(what: str, attempt: Callable[[], Awaitable[T]]) -> T:
    """Return the result of `attempt`, retried with growing delays while Redis is unavailable.

    `attempt` must be idempotent: it may take effect more than once. `what` names it in the log.

    Raises:
        RedisError: one that no waiting ends (shared/redis_errors.py).
    """
    delay = FIRST_DELAY_S
    while True:
        try:
            return await attempt()
        except RedisError as error:
            if action_for(error) is Action.END:
                raise
            hint = "; millrace status names the key" if is_wrong_type(error) else ""
            fields = {"what": what, "error": type(error).__name__, "reason": f"{error}{hint}"}
            _log.warning("Redis is unavailable; retrying", extra=fields)
        await asyncio.sleep(delay)
        delay = min(2 * delay, LONGEST_DELAY_S)
