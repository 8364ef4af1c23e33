"""Limits on the bytes of media: of one request, and of all that are here."""

import asyncio

import pytest

from services.mm_encoder.received import FETCHED_AT_ONCE, HeldBytes, Received
from shared.errors import RequestError


def test_requests_share_a_limit_and_give_back_what_they_held() -> None:
    held = HeldBytes(150)
    first, second = (Received(100, held, fits=True) for _ in range(2))
    first.add(90)
    second.add(60)
    with pytest.raises(RequestError) as busy:
        second.add(1)
    assert (busy.value.failure.status, busy.value.failure.code) == (503, "overloaded")
    first.forget()
    second.add(1)
    second.forget()
    assert held.sum == 0


def test_the_limit_of_one_request_comes_first() -> None:
    received = Received(100, HeldBytes(100), fits=True)
    with pytest.raises(RequestError) as over:
        received.add(101)
    assert over.value.failure.status == 400


async def test_a_request_fetches_a_few_at_a_time_and_says_when_it_does() -> None:
    told: list[bool] = []
    received = Received(100, HeldBytes(100), True, told.append)
    running, end = asyncio.Semaphore(0), asyncio.Event()
    most = 0

    async def fetch() -> None:
        nonlocal most
        async with received.fetch():
            most += 1
            running.release()
            await end.wait()

    tasks = [asyncio.create_task(fetch()) for _ in range(FETCHED_AT_ONCE + 1)]
    for _ in range(FETCHED_AT_ONCE):
        await running.acquire()
    await asyncio.sleep(0)
    assert most == FETCHED_AT_ONCE
    assert told == [True]
    end.set()
    await asyncio.gather(*tasks)
    assert most == FETCHED_AT_ONCE + 1
    assert told == [True, False]
