import array
import asyncio
import os
from typing import Any

import pytest
from redis.asyncio import Redis

from shared.bus.blobs import CHUNK, MEDIA, SMALL_BYTES, Blobs
from shared.bus.keys import Keys
from shared.errors import RequestError

TTL_S = 3600


@pytest.fixture
def blobs(redis: Redis, keys: Keys) -> Blobs:
    return Blobs(redis, keys, TTL_S, 10 * CHUNK)


async def budget_used(redis: Redis, keys: Keys) -> int:
    """The recorded sum, checked against the sizes it is the sum of."""
    sizes = {name: int(size) for name, size in (await redis.hgetall(keys.blob_sizes())).items()}
    total, pinned = sizes.pop(b"sum", 0), sizes.pop(b"pinned", 0)
    assert total == sum(sizes.values())
    pins = set(await redis.zrange(keys.blob_pins(), 0, -1))
    assert pinned == sum(sizes[member] for member in pins)
    assert set(await redis.zrange(keys.blobs(), 0, -1)) | pins == set(sizes)
    return total


@pytest.mark.parametrize("size", [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 9 * CHUNK + 5])
async def test_round_trip(redis: Redis, keys: Keys, blobs: Blobs, size: int) -> None:
    data = os.urandom(size)
    await blobs.put("media", "k", data, b"\xffmeta")
    assert await blobs.get("media", "k") == (data, b"\xffmeta")
    assert await blobs.meta("media", "k") == b"\xffmeta"
    assert await budget_used(redis, keys) == size
    for name in await redis.keys("test:blob:*"):
        assert 0 < await redis.ttl(name) <= TTL_S
        assert name == b"test:blob:media:k" or await redis.strlen(name) <= CHUNK


@pytest.mark.parametrize("size", [0, 1, SMALL_BYTES])
async def test_a_small_blob_is_one_command_each_way(
    redis: Redis, keys: Keys, blobs: Blobs, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    def another(*_: object, **__: object) -> None:
        raise AssertionError("a second command")

    monkeypatch.setattr(blobs, "_write_chunks", another)
    if size:
        monkeypatch.setattr("shared.bus.blobs.command", another)
    data = os.urandom(size)
    await blobs.put("media", "k", data, b"meta")
    assert await blobs.get("media", "k") == (data, b"meta")
    assert await budget_used(redis, keys) == size
    if size:
        await redis.delete(keys.blob_chunk("media", "k", 0))
        assert await blobs.get("media", "k") is None


async def test_memoryview_of_any_format(blobs: Blobs) -> None:
    floats = array.array("d", [1.5, 2.5])
    await blobs.put("embeds", "k", memoryview(floats))
    assert await blobs.get("embeds", "k") == (floats.tobytes(), b"")


async def test_absent(blobs: Blobs) -> None:
    assert await blobs.get("media", "k") is None
    assert await blobs.meta("media", "k") is None


async def test_kinds_are_apart(blobs: Blobs) -> None:
    await blobs.put("media", "k", b"m")
    await blobs.put("embeds", "k", b"e")
    await blobs.delete("media", ["k", "absent"])
    await blobs.delete("media", [])
    assert await blobs.get("media", "k") is None
    assert await blobs.get("embeds", "k") == (b"e", b"")


async def test_delete_leaves_nothing(redis: Redis, keys: Keys, blobs: Blobs) -> None:
    await blobs.put("media", "k", bytes(3 * CHUNK))
    await blobs.delete("media", ["k"])
    assert await budget_used(redis, keys) == 0
    assert await redis.keys() == [keys.blob_sizes().encode()]


async def test_invisible_until_the_last_chunk_is_in(
    redis: Redis, keys: Keys, blobs: Blobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(*, keys: list[str], args: list[object]) -> None:
        raise asyncio.CancelledError

    enter = blobs._index_blob
    calls = iter([enter, fail])
    monkeypatch.setattr(blobs, "_index_blob", lambda **words: next(calls)(**words))
    with pytest.raises(asyncio.CancelledError):
        await blobs.put("media", "k", bytes(2 * CHUNK))
    assert await redis.exists(keys.blob_chunk("media", "k", 1))
    assert await blobs.get("media", "k") is None
    monkeypatch.undo()
    await blobs.put("media", "k", bytes(2 * CHUNK))  # a second writer, after the first one died
    assert await blobs.get("media", "k") == (bytes(2 * CHUNK), b"")
    assert await budget_used(redis, keys) == 2 * CHUNK


@pytest.mark.parametrize("lost", [0, 2])
async def test_lost_chunk_is_a_lost_blob(redis: Redis, keys: Keys, blobs: Blobs, lost: int) -> None:
    await blobs.put("embeds", "k", bytes(3 * CHUNK))
    await redis.delete(keys.blob_chunk("embeds", "k", lost))
    assert await blobs.meta("embeds", "k") is None
    assert await blobs.get("embeds", "k") is None
    assert await redis.keys() == [keys.blob_sizes().encode()]
    assert await budget_used(redis, keys) == 0


async def test_least_recently_used_goes_first(redis: Redis, keys: Keys, blobs: Blobs) -> None:
    for name in "abc":
        await blobs.put("embeds", name, bytes(3 * CHUNK))
    await blobs.meta("embeds", "a")
    await blobs.get("embeds", "b")
    await blobs.put("embeds", "d", bytes(4 * CHUNK))
    assert [await blobs.meta("embeds", name) for name in "abcd"] == [b"", b"", None, b""]
    assert await budget_used(redis, keys) == 10 * CHUNK
    await blobs.put("embeds", "e", bytes(10 * CHUNK))
    assert await budget_used(redis, keys) == 10 * CHUNK
    assert len(await redis.keys("test:blob:*")) == 11


async def test_larger_than_the_budget(redis: Redis, blobs: Blobs) -> None:
    with pytest.raises(RequestError, match="exceed the server's budget") as raised:
        await blobs.put("media", "k", bytes(10 * CHUNK + 1))
    assert raised.value.failure.status == 503
    assert await redis.keys() == []


async def test_overwriting_counts_once(redis: Redis, keys: Keys, blobs: Blobs) -> None:
    for _ in range(3):
        await blobs.put("embeds", "k", bytes(6 * CHUNK))
    assert await budget_used(redis, keys) == 6 * CHUNK
    assert await blobs.meta("embeds", "k") is not None


async def test_writers_at_once_stay_within_the_budget(redis: Redis, keys: Keys, blobs: Blobs) -> None:
    await asyncio.gather(*(blobs.put("embeds", str(i), bytes(3 * CHUNK)) for i in range(6)))
    assert await budget_used(redis, keys) <= 10 * CHUNK
    for i in range(6):
        found = await blobs.get("embeds", str(i))
        assert found is None or found[0] == bytes(3 * CHUNK)


async def test_expired_blobs_leave_index_and_sum(redis: Redis, keys: Keys, blobs: Blobs) -> None:
    await blobs.put("media", "old", bytes(2 * CHUNK))
    await blobs.put("media", "young", b"y")
    for name in await redis.keys("test:blob:media:old*"):  # what an hour does to it
        await redis.delete(name)
    await redis.zincrby(keys.blobs(), -TTL_S * 1e6, "media:old")
    await blobs.put("media", "new", b"n")
    assert await budget_used(redis, keys) == 2
    assert await blobs.get("media", "young") == (b"y", b"")


async def test_use_renews_the_whole_blob(redis: Redis, keys: Keys, blobs: Blobs) -> None:
    await blobs.put("media", "k", bytes(CHUNK + 1))
    names = await redis.keys("test:blob:*")
    assert len(names) == 3
    for use in (blobs.meta, blobs.get):
        for name in names:
            await redis.expire(name, TTL_S // 2)
        await use("media", "k")
        assert all([await redis.ttl(name) > TTL_S // 2 for name in names])


async def test_uploads_are_never_evicted_and_refused_beyond_their_share(redis: Redis, keys: Keys, blobs: Blobs) -> None:
    await blobs.put("embeds", "old", bytes(7 * CHUNK))
    assert await blobs.pin_uploads({"a-0": bytes(2 * CHUNK), "a-1": b"x"}, 60) is None
    assert await blobs.pin_uploads({"b-0": bytes(2 * CHUNK)}, 60) is None
    assert await blobs.meta("embeds", "old") is None, "it makes room"
    assert await blobs.pin_uploads({"c-0": b"y", "c-1": bytes(CHUNK)}, 60) == 4 * CHUNK + 1
    assert await blobs.get("media", "c-0") is None, "all of a request's, or none"
    for n in range(3):
        await blobs.put("embeds", f"{n}", bytes(5 * CHUNK))
    assert [await blobs.get("media", key) for key in ("a-0", "a-1", "b-0")] == [
        (bytes(2 * CHUNK), b""),
        (b"x", b""),
        (bytes(2 * CHUNK), b""),
    ]
    assert await budget_used(redis, keys) <= 10 * CHUNK
    await blobs.delete("media", ["a-0", "a-1"])
    assert await blobs.pin_uploads({"c-0": b"y", "c-1": bytes(CHUNK)}, 60) is None
    await blobs.delete("media", ["b-0", "c-0", "c-1"])
    assert (await budget_used(redis, keys), await redis.hget(keys.blob_sizes(), "pinned")) == (5 * CHUNK, b"0")


async def test_pinning_again_after_a_lost_reply_counts_once(redis: Redis, keys: Keys, blobs: Blobs) -> None:
    for _ in range(3):
        assert await blobs.pin_uploads({"a-0": bytes(4 * CHUNK)}, 60) is None
    assert await budget_used(redis, keys) == 4 * CHUNK


async def test_uploads_of_a_dead_gateway_expire_and_use_does_not_renew_them(
    redis: Redis, keys: Keys, blobs: Blobs
) -> None:
    assert await blobs.pin_uploads({"a-0": bytes(5 * CHUNK)}, 60) is None
    assert await blobs.get("media", "a-0") is not None
    names = await redis.keys("test:blob:media:*")
    assert len(names) == 6
    assert all([0 < await redis.ttl(name) <= 60 for name in names])
    await redis.zincrby(keys.blob_pins(), -60 * 1e6, "media:a-0")  # a minute later
    assert await blobs.pin_uploads({"b-0": bytes(5 * CHUNK)}, 60) is None
    assert await budget_used(redis, keys) == 5 * CHUNK


class Forgetful:
    """A Redis that comes back without its data, and its scripts, before one of the chunks is written."""

    def __init__(self, redis: Redis, before: int) -> None:
        self.redis, self.left = redis, before
        self.calls: list[int] = []  # in each pipeline

    def pipeline(self, transaction: bool) -> Any:
        pipe = self.redis.pipeline(transaction)
        call = pipe.evalsha
        self.calls.append(0)

        def evalsha(*words: Any) -> Any:
            if self.left == 0:
                pipe.flushall()
                pipe.script_flush()
            self.left -= 1
            self.calls[-1] += 1
            return call(*words)

        pipe.evalsha = evalsha  # type: ignore[method-assign]
        return pipe

    async def execute_command(self, *words: Any) -> Any:
        return await self.redis.execute_command(*words)


@pytest.mark.parametrize("before", range(5))
async def test_an_upload_is_whole_and_can_be_deleted_though_redis_lost_the_beginning(
    redis: Redis, keys: Keys, blobs: Blobs, before: int
) -> None:
    blobs._redis = forgetful = Forgetful(redis, before)  # type: ignore[assignment]
    first, second = os.urandom(3 * CHUNK), os.urandom(CHUNK + 1)
    assert await blobs.pin_uploads({"a-0": first, "a-1": second}, 60) is None
    assert forgetful.left < 0
    blobs._redis = redis
    assert await blobs.get(MEDIA, "a-0") == (first, b"")
    assert await blobs.get(MEDIA, "a-1") == (second, b"")
    assert await budget_used(redis, keys) == 4 * CHUNK + 1
    await blobs.delete(MEDIA, ["a-0", "a-1"])
    assert set(await redis.keys()) == {keys.blob_sizes().encode()}, "the sums alone"


async def test_chunks_of_uploads_go_together_as_far_as_their_bytes_are_few(
    redis: Redis, keys: Keys, blobs: Blobs
) -> None:
    blobs._redis = counting = Forgetful(redis, -1)  # type: ignore[assignment]
    assert await blobs.pin_uploads({"a-0": b"x", "a-1": bytes(4 * CHUNK), "a-2": b"y", "a-3": b"z"}, 60) is None
    assert counting.calls == [4, 3], "four chunks at most, and whatever is small beside them"
    counting.calls.clear()
    small = {f"b-{n}": b"%d" % n for n in range(70)}
    assert await blobs.pin_uploads(small, 60) is None
    assert counting.calls == [64, 6]
    blobs._redis = redis
    assert [await blobs.get(MEDIA, key) for key in small] == [(data, b"") for data in small.values()]


async def test_an_upload_that_was_deleted_is_not_written_to_its_end(redis: Redis, keys: Keys, blobs: Blobs) -> None:
    """Its request was given up in the middle, and a command that was sent before arrives late."""
    script = blobs._write_pinned
    assert await blobs.pin_uploads({"a-0": bytes(CHUNK)}, 60) is None
    await blobs.delete(MEDIA, ["a-0"])
    args = [keys.blob_prefix(), CHUNK, keys.blob_member(MEDIA, "a-0"), 60, CHUNK, 1, 0, bytes(CHUNK)]
    assert await script(keys=[keys.blobs(), keys.blob_sizes(), keys.blob_pins()], args=args) == 0
    assert set(await redis.keys()) == {keys.blob_sizes().encode()}


async def put_chunks(blobs: Blobs, owner: str, *names: int) -> None:
    for name in names:
        await blobs.put(MEDIA, f"{owner}{name}", bytes(CHUNK), owner=owner)


async def kept(redis: Redis, keys: Keys) -> list[str]:
    """The names of all blobs, oldest first, of whose owners the sums are right."""
    members = [member.decode() for member in await redis.zrange(keys.blobs(), 0, -1)]
    owned = {name.decode(): value.decode() for name, value in (await redis.hgetall(f"{keys.blobs()}:owned")).items()}
    sums: dict[str, float] = {}
    for member, value in owned.items():
        size, owner = value.split(":")
        sums[owner] = sums.get(owner, 0) + int(size)
        assert await redis.zscore(f"{keys.blobs()}:of:{owner}", member) == await redis.zscore(keys.blobs(), member)
    assert {
        one.decode(): size for one, size in await redis.zrange(f"{keys.blobs()}:owners", 0, -1, withscores=True)
    } == sums
    assert set(owned) == set(members)
    return [member.removeprefix("media:") for member in members]


async def test_who_has_most_makes_room(redis: Redis, keys: Keys, blobs: Blobs) -> None:
    await put_chunks(blobs, "a", *range(8))
    await put_chunks(blobs, "b", 0, 1)
    assert await blobs.get(MEDIA, "a0") is not None  # now the last one used
    await put_chunks(blobs, "b", 2, 3)
    assert await kept(redis, keys) == ["a3", "a4", "a5", "a6", "a7", "b0", "b1", "a0", "b2", "b3"]
    await put_chunks(blobs, "a", 8)
    assert "a3" not in await kept(redis, keys), "its own"
    await put_chunks(blobs, "b", *range(4, 24))
    names = await kept(redis, keys)
    assert [name for name in names if name[0] == "a"] == ["a5", "a6", "a7", "a0", "a8"]
    assert names[-5:] == [f"b{name}" for name in range(19, 24)]
    assert await budget_used(redis, keys) == 10 * CHUNK


async def test_owners_are_forgotten_with_their_blobs(redis: Redis, keys: Keys, blobs: Blobs) -> None:
    await put_chunks(blobs, "a", 0, 1)
    await blobs.put(MEDIA, "a1", b"smaller", owner="a")
    assert await kept(redis, keys) == ["a0", "a1"]
    await blobs.delete(MEDIA, ["a0", "a1"])
    assert [key async for key in redis.scan_iter(f"{keys.blobs()}:o*")] == []


async def test_what_an_older_build_has_evicted_keeps_nothing_from_being_evicted(
    redis: Redis, keys: Keys, blobs: Blobs
) -> None:
    await put_chunks(blobs, "a", *range(9))
    for name in ("media:a0", "media:a1"):
        await redis.zrem(keys.blobs(), name)
        await redis.hdel(keys.blob_sizes(), name)
        await redis.hincrby(keys.blob_sizes(), "sum", -CHUNK)
    await put_chunks(blobs, "b", *range(4))
    assert await kept(redis, keys) == [*(f"a{name}" for name in range(3, 9)), *(f"b{name}" for name in range(4))]


async def test_blobs_without_an_owner_that_are_older_make_room_first(redis: Redis, keys: Keys, blobs: Blobs) -> None:
    for name in range(10):
        await blobs.put(MEDIA, f"old{name}", bytes(CHUNK))
    await put_chunks(blobs, "a", 0, 1, 2)
    assert [member.decode() for member in await redis.zrange(keys.blobs(), 0, -1)] == [
        *(f"media:old{name}" for name in range(3, 10)),
        *(f"media:a{name}" for name in range(3)),
    ]


async def test_who_has_most_but_only_the_new_blob_takes_nothing_of_a_small_share(
    redis: Redis, keys: Keys, blobs: Blobs
) -> None:
    await put_chunks(blobs, "c", 0)
    await put_chunks(blobs, "b", *range(4))
    await blobs.put(MEDIA, "a0", bytes(6 * CHUNK), owner="a")
    assert await kept(redis, keys) == ["c0", "b1", "b2", "b3", "a0"]


@pytest.mark.parametrize("lost", [":owned", ":owners", ":of:a", ":of:b"])
async def test_an_index_of_owners_that_has_lost_a_part_ends_no_eviction_late(
    redis: Redis, keys: Keys, blobs: Blobs, lost: str
) -> None:
    await put_chunks(blobs, "a", *range(6))
    await put_chunks(blobs, "b", *range(4))
    await redis.delete(f"{keys.blobs()}{lost}")
    await put_chunks(blobs, "b", *range(4, 8))
    await put_chunks(blobs, "c", *range(10))
    assert await budget_used(redis, keys) == 10 * CHUNK
    await put_chunks(blobs, "a", *range(6, 26))
    await put_chunks(blobs, "b", *range(8, 28))
    await put_chunks(blobs, "a", *range(26, 46))
    if lost == ":owned":  # what was lost has gone, and all is right again
        assert sorted({name[0] for name in await kept(redis, keys)}) == ["a", "b", "c"]


@pytest.mark.parametrize("size", ["x", "-1", "1.5", "nan", "1e300", str(1 << 62)])
async def test_a_blob_whose_size_is_damaged_is_deleted_in_time(
    redis: Redis, keys: Keys, blobs: Blobs, size: str
) -> None:
    await put_chunks(blobs, "a", 0)
    await redis.hset(keys.blob_sizes(), "media:a0", size)
    await blobs.delete(MEDIA, ["a0"])
    assert await redis.zcard(keys.blobs()) == 0
    taken = await redis.hget(keys.blob_sizes(), "sum")
    assert taken is not None
    assert 0 <= int(taken) <= CHUNK
    await put_chunks(blobs, "b", *range(11))
    assert len(await kept(redis, keys)) == (10 if int(taken) == 0 else 9), "the budget still holds"
