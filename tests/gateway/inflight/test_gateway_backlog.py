"""The backlog: refusals of requests that would be too many, or answered too late."""

import pytest
from prometheus_client import CollectorRegistry
from redis.asyncio import Redis

from services.gateway.errors import TooLateError
from services.gateway.inflight.backlog import FRESH_S, Backlog
from services.gateway.inflight.pace import LEAST_ENDED, WINDOW_S, Pace
from services.gateway.metrics import GatewayMetrics
from shared.bus.keys import GENERATE, Keys
from shared.bus.work_stream import WorkStream
from shared.errors import RequestError
from shared.messages import BATCH_PRIORITY, Share


def test_the_pace_is_that_of_the_window() -> None:
    pace = Pace()
    assert pace.wait_s(5) is None
    for second in range(200):
        pace.note(float(second), 2 * second)
    assert pace.wait_s(10) == 5.0
    pace.note(199 + WINDOW_S, 398)
    assert pace.wait_s(10) is None, "nothing has ended for a whole window"


def test_few_ends_are_no_pace() -> None:
    pace = Pace()
    pace.note(0, 0)
    pace.note(10, LEAST_ENDED - 1)
    assert pace.wait_s(1) is None
    pace.note(20, LEAST_ENDED)
    assert pace.wait_s(LEAST_ENDED) == 20


def test_a_stream_that_was_made_anew_begins_anew() -> None:
    pace = Pace()
    pace.note(0, 1000)
    pace.note(10, 2000)
    pace.note(20, 0)
    assert pace.wait_s(1) is None
    pace.note(30, 100)
    assert pace.wait_s(100) == 10


async def test_who_would_be_late_is_refused_but_not_who_passes_the_queue(redis: Redis, keys: Keys) -> None:
    now = 0.0
    rejections = GatewayMetrics(CollectorRegistry()).rejections
    backlog = Backlog(redis, keys, 4096, rejections, lambda: now)
    stream = WorkStream(redis, keys, GENERATE, "engine", "e", 3)
    await stream.join()
    await backlog.admit(1, 1.0)
    for _ in range(20):  # 20 have ended within 10 s, and 100 wait
        entry = await redis.xadd(keys.stream(GENERATE), {"v": "1"})
        await redis.xdel(keys.stream(GENERATE), entry)
    for _ in range(100):
        await redis.xadd(keys.stream(GENERATE), {"v": "1"})
    now = 10.0
    await backlog.admit(1, 51.0)
    with pytest.raises(TooLateError, match="would wait for 50 s") as refused:
        await backlog.admit(1, 49.0)
    assert refused.value.failure.status == 503
    await backlog.admit(1, 49.0, Share("light"))
    await redis.rpush(keys.turn(GENERATE, 1, "heavy"), *map(str, range(99)))
    with pytest.raises(TooLateError):
        await backlog.admit(1, 49.0, Share("heavy"))
    with pytest.raises(TooLateError):
        await backlog.admit(1, 49.0)
    await redis.rpush(keys.turn(GENERATE, BATCH_PRIORITY, ""), *map(str, range(50)))
    await backlog.admit(1, 26.0)
    with pytest.raises(TooLateError, match="would wait for 25 s"):
        await backlog.admit(1, 24.0)


async def test_a_full_queue(redis: Redis, keys: Keys) -> None:
    now = 0.0
    backlog = Backlog(redis, keys, 2, GatewayMetrics(CollectorRegistry()).rejections, lambda: now)
    await backlog.admit(2, 1.0)
    with pytest.raises(RequestError, match="The queue is full"):
        await backlog.admit(1, 1.0)
    now = FRESH_S
    await backlog.admit(2, 1.0)
