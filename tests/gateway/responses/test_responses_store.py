"""Stored responses of several owners, within one budget."""

from redis.asyncio import Redis

from services.gateway.dialects.responses.answered import Answered
from services.gateway.request.answer_format import AnswerFormat
from services.gateway.responses.store import ResponseStore, StoredHead
from shared.bus.blobs import Blobs
from shared.bus.keys import Keys

BUDGET = 100_000


async def test_one_owner_s_flood_deletes_none_of_another_s_within_its_share(redis: Redis, keys: Keys) -> None:
    store = ResponseStore(Blobs(redis, keys.responses(), 60, BUDGET))

    async def respond(request_id: str, owner: str) -> None:
        await store.put_head(request_id, StoredHead(owner, 0.0, AnswerFormat(owner=owner)), bytes(BUDGET // 10))
        await store.put_end(request_id, owner, Answered(cancelled=True))

    for number in range(3):
        await respond(f"light{number}", "@light")
    for number in range(40):
        await respond(f"heavy{number}", "@heavy")
    for number in range(3):
        assert await store.head(f"light{number}", "@light") is not None
        assert await store.items(f"light{number}") == bytes(BUDGET // 10)
        assert await store.end(f"light{number}") == Answered(cancelled=True)
    assert await store.head("heavy0", "@heavy") is None
    assert await store.head("heavy39", "@heavy") is not None
