"""Emissions reach their streams in order, through a Redis that comes and goes, before anyone is told of an end."""

import asyncio
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest
from machine import PATIENCE_S
from redis.asyncio import Redis
from redis.exceptions import ConnectionError, OutOfMemoryError, ResponseError

from services.engine.loop.step_output import End, StepOutput
from services.engine.transport.outbox import LEAD, Outbox
from shared.bus import retry as patience
from shared.bus.keys import Keys
from shared.bus.retry import retry_until_available
from shared.bus.streams import LogWriter
from shared.message_codec import from_entry
from shared.messages import Finish, TokenRun, Tokens


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "FIRST_DELAY_S", 0.001)


def step_output(index: int, finish: Finish | None = None) -> StepOutput:
    made = StepOutput()
    made.add_run(0, TokenRun("r", 1, index, (index,), None, finish))
    return made


async def test_what_redis_refuses_for_now_is_sent_again_in_order(
    redis: Redis, keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, failures = LogWriter.send, [ConnectionError("gone"), OutOfMemoryError("full", status_code="OOM")]

    async def send(log: LogWriter, message: Tokens) -> None:
        if message.runs[0].index == 1 and failures:
            raise failures.pop()
        await real(log, message)

    monkeypatch.setattr(LogWriter, "send", send)
    ended: asyncio.Future[list[End]] = asyncio.get_running_loop().create_future()
    length_at_end = []

    async def on_ended(ends: Sequence[End]) -> None:
        length_at_end.append(int(await redis.xlen(keys.tokens(0))))
        ended.set_result(list(ends))

    outbox = Outbox(redis, keys, on_ended)
    outbox.open()
    task = asyncio.create_task(outbox.run())
    for index in range(3):
        outbox.put(step_output(index, Finish("length") if index == 2 else None))
    [end] = await asyncio.wait_for(ended, PATIENCE_S)
    assert (end.request_id, end.epoch, end.reason, end.generated, end.error) == ("r", 1, "length", 3, None)
    task.cancel()
    messages = [from_entry(fields) for _, fields in await redis.xrange(keys.tokens(0))]
    assert [m.runs[0].index for m in messages if isinstance(m, Tokens)] == [0, 1, 2]
    assert length_at_end == [3]
    assert not failures


async def test_the_model_waits_when_redis_is_far_behind(redis: Redis, keys: Keys) -> None:
    async def on_ended(ends: Sequence[End]) -> None: ...

    waits = list[str]()
    waited = threading.Event()

    @contextmanager
    def waiting() -> Iterator[None]:
        waits.append("began")
        waited.set()
        yield
        waits.append("ended")

    outbox = Outbox(redis, keys, on_ended, waiting=waiting)
    outbox.open()
    put = threading.Semaphore(0)

    def model() -> None:
        for index in range(LEAD + 1):
            outbox.put(step_output(index))
            put.release()

    thread = threading.Thread(target=model)
    thread.start()
    for _ in range(LEAD):
        assert await asyncio.to_thread(put.acquire, timeout=PATIENCE_S)
    assert await asyncio.to_thread(waited.wait, PATIENCE_S)
    assert not put.acquire(blocking=False)
    assert waits == ["began"], "once, and not while there was room"
    task = asyncio.create_task(outbox.run())
    await asyncio.to_thread(thread.join)
    task.cancel()
    assert waits == ["began", "ended"]


async def test_closing_lets_the_model_go(redis: Redis, keys: Keys) -> None:
    async def on_ended(ends: Sequence[End]) -> None: ...

    outbox = Outbox(redis, keys, on_ended)
    outbox.open()

    def put_all() -> None:
        for index in range(LEAD + 1):
            outbox.put(step_output(index))

    thread = threading.Thread(target=put_all)
    thread.start()
    outbox.close()
    await asyncio.to_thread(thread.join)


async def test_an_error_that_waiting_does_not_mend_is_raised() -> None:
    async def wrong() -> None:
        raise ResponseError("WRONGTYPE")

    with pytest.raises(ResponseError, match="WRONGTYPE"):
        await retry_until_available("test", wrong)
