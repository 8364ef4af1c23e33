"""What requests that were not submitted, or perhaps were, leave in Redis."""

import asyncio
from pathlib import Path
from typing import Any

import openai
import pytest
from gateway_stages import Running, Stages, running
from redis.asyncio import Redis
from redis.exceptions import ConnectionError
from test_gateway_repeats import LOOK, ask

from services.gateway.inflight.leftovers import Leftovers
from shared.bus.blobs import Blobs
from shared.bus.keys import Keys
from shared.bus.records import Records


class Absence:
    """A Redis that is away, as the gateway's records see it, after a submission or before one."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, submitted: bool) -> None:
        self.away = True
        submitting = Records.submit_once

        async def submit_once(records: Records, *given: Any) -> Any:
            if not self.away or submitted:
                earlier = await submitting(records, *given)
            if self.away:
                raise ConnectionError("its reply was lost")
            return earlier

        monkeypatch.setattr(Records, "submit_once", submit_once)
        for name in ("delete", "exists"):
            monkeypatch.setattr(Records, name, self._guarded(getattr(Records, name)))

    def _guarded(self, real: Any) -> Any:
        async def guarded(*given: Any) -> Any:
            if self.away:
                raise ConnectionError("away")
            return await real(*given)

        return guarded


def left(server: Running) -> Leftovers:
    return server.gateway._open_requests._pipeline._leftovers


async def test_a_request_that_was_submitted_after_all_answers_its_repetition(
    checkpoint: Path, redis_url: str, redis: Redis, keys: Keys, stages: Stages, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(checkpoint, redis_url) as server:
        absence = Absence(monkeypatch, submitted=True)
        with pytest.raises(openai.InternalServerError):
            await ask(server)
        request = await stages.request()
        assert len(left(server)) == 1
        absence.away = False
        again = ask(server)
        assert (await stages.attached()).request_id == request.id
        await server.gateway._open_requests.check_records()
        assert not left(server)
        assert await redis.exists(keys.request(request.id))
        await stages.answer(request, "x")
        assert (await again).choices[0].message.content == "x"


async def test_uploads_of_a_request_with_a_key_that_was_not_submitted_are_removed(
    checkpoint: Path, redis_url: str, redis: Redis, keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(checkpoint, redis_url) as server:
        absence = Absence(monkeypatch, submitted=False)
        with pytest.raises(openai.InternalServerError):
            await ask(server, messages=LOOK)
        assert await redis.keys(keys.blob("media", "*"))
        absence.away = False
        await server.gateway._open_requests.check_records()
        assert not left(server)
        assert not await redis.keys(keys.blob("media", "*"))


async def test_who_is_interrupted_while_it_removes_goes_on_later(
    redis: Redis, keys: Keys, caplog: pytest.LogCaptureFixture
) -> None:
    """The limit on a submission may end while what a failure left is removed."""
    records, stuck = Records(redis, keys), asyncio.Event()
    await redis.hset(keys.request("r"), "epoch", "0")  # type: ignore[misc]
    deleting = records.delete

    async def delete(request_ids: Any) -> None:
        if not stuck.is_set():
            stuck.set()
            await asyncio.get_running_loop().create_future()
        await deleting(request_ids)

    records.delete = delete  # type: ignore[assignment,method-assign]
    leftovers = Leftovers(records, Blobs(redis, keys, 1 << 20, 60))
    removing = asyncio.create_task(leftovers.remove(["r"], []))
    await stuck.wait()
    removing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await removing
    assert len(leftovers) == 1
    assert any("retrying" in text for text in caplog.messages)
    await leftovers.remove_again()
    assert (len(leftovers), await redis.exists(keys.request("r"))) == (0, 0)


async def test_two_who_remove_at_once_both_find_it_removed(
    redis: Redis, keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = Records(redis, keys)
    leftovers = Leftovers(records, Blobs(redis, keys, 1 << 20, 60))
    absence = Absence(monkeypatch, submitted=False)
    for request_id in "one", "two":
        await redis.hset(keys.request(request_id), "epoch", "0")  # type: ignore[misc]
        await leftovers.remove([request_id], [])
    assert len(leftovers) == 2
    absence.away = False

    async def remove() -> int:
        await leftovers.remove_again()
        return int(await redis.exists(keys.request("one"), keys.request("two")))

    assert await asyncio.gather(remove(), remove()) == [0, 0]
