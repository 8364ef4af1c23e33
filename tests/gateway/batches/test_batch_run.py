"""Work on one batch in a real Redis, with answers of the test's own: what is in memory, and who may write."""

import asyncio
import json
import time
from contextlib import nullcontext
from typing import Any
from unittest.mock import Mock

import msgspec
import pytest
from batch_files import chat_line, jsonl
from machine import PATIENCE_S
from redis.asyncio import Redis
from redis.exceptions import ResponseError

from services.gateway.batches.batch import About
from services.gateway.batches.files import FileLimits, FileStore
from services.gateway.batches.lines import Line, answered
from services.gateway.batches.requests import LineRequests, Reply
from services.gateway.batches.run import BatchRun, RunParts
from services.gateway.batches.store import BatchStore, LeaseLostError
from services.gateway.batches.upload import FileWriter
from shared.bus.keys import Keys
from shared.errors import RequestError

LIMITS = FileLimits(
    keep_s=3600, budget_bytes=1 << 26, owner_bytes=1 << 26, file_bytes=1 << 26, lines=50_000, line_bytes=1 << 20
)


class Requests:
    """Answers to lines, and how many are asked for at a time."""

    def __init__(self) -> None:
        self.open = self.most = 0
        self.asked: list[int] = []

    async def ask(self, _about: About, line: Line) -> Reply:
        self.open += 1
        self.most = max(self.most, self.open)
        self.asked.append(line.number)
        await asyncio.sleep(0)
        self.open -= 1
        return Reply(200, "r", b"{}")

    async def forget(self, _about: About, _number: int) -> None: ...

    async def cancel(self, _about: About, _numbers: list[int]) -> None: ...


def about(batch_id: str = "batch_1") -> About:
    now = int(time.time())
    return About(batch_id, "o", "/v1/chat/completions", "file-in", "file-out", "file-err", "1h", now, now + 3600, 60)


async def stored(redis: Redis, keys: Keys, content: bytes) -> FileStore:
    files = FileStore(redis, keys, LIMITS)
    writer = FileWriter(files, "file-in", "o")
    for begin in range(0, len(content), 50_000):
        await writer.write(content[begin : begin + 50_000])
    await writer.close("in", 3600)
    return files


def parts(store: BatchStore, files: FileStore, requests: Any, slots: int) -> RunParts:
    return RunParts(store, files, requests, asyncio.Semaphore(slots), slots, Mock())


@pytest.mark.slow
async def test_ten_thousand_lines_are_read_no_further_than_they_run(redis: Redis, keys: Keys) -> None:
    count, slots = 10_000, 8
    files = await stored(redis, keys, jsonl(*(chat_line(str(n), "x" * 100) for n in range(count))))
    chunks: list[int] = []
    read = files.chunks

    async def counted(file_id: str) -> Any:
        async for chunk in read(file_id):
            chunks.append(len(requests.asked))
            yield chunk

    files.chunks = counted  # type: ignore[method-assign]
    requests = Requests()
    store = BatchStore(redis, keys, files, "g", 60_000)
    await store.create(about(), count, "", None)
    assert await store.claim(1, ()) == (["batch_1"], [])
    batch = await store.find("batch_1", "o")
    await BatchRun(parts(store, files, requests, slots), batch).run()
    batch = await store.find("batch_1", "o")
    assert (batch.status, batch.completed) == ("completed", count)
    assert sorted(requests.asked) == list(range(1, count + 1))
    assert requests.most <= slots
    assert chunks[: len(chunks) // 2] == [0] * (len(chunks) // 2), "to look at all lines first"
    second = chunks[len(chunks) // 2 :]
    assert len(second) >= 2
    lines_of_a_chunk = count / (await files.size("file-in") or 1) * (1 << 20)
    for place, asked in enumerate(second):
        assert asked >= place * lines_of_a_chunk - slots - 2, "a chunk was read too early"


@pytest.mark.parametrize(
    ("status", "body", "told"),
    [(200, b'{"a": 1}', 200), (200, b"data: {}\n\n", 500), (200, b"", 500), (503, b"full", 503)],
)
async def test_an_answer_that_is_not_json_is_kept_as_an_error(status: int, body: bytes, told: int) -> None:
    async def app(_scope: Any, _receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": status, "headers": []})
        await send({"type": "http.response.body", "body": body})

    keyring, slots = Mock(), Mock()
    keyring.by_owner.return_value = Mock(tenant=None, share=None)
    slots.slot.return_value = nullcontext()
    reply = await LineRequests(app, keyring, slots, Mock()).ask(about(), Line(1, "a", b"{}"))
    assert reply.status == told
    if told == 500:
        assert "error" in json.loads(answered("batch_1", Line(1, "a", b"{}"), 500, "r", reply.body))["response"]["body"]


async def test_lines_that_run_when_the_window_ends_expire(
    redis: Redis, keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    both, wait = asyncio.Event(), asyncio.wait

    class Silent(Requests):
        async def ask(self, _about: About, line: Line) -> Reply:
            self.asked.append(line.number)
            if len(self.asked) == 2:
                both.set()
            return await asyncio.get_running_loop().create_future()

    async def wait_until_both_run(tasks: Any, **how: Any) -> Any:
        """The window ends then, and not at its time: who knows how long that takes."""
        if "timeout" not in how:
            return await wait(tasks, **how)
        assert 1234 - PATIENCE_S < how.pop("timeout") <= 1234
        ends = asyncio.create_task(both.wait())
        done, pending = await wait([*tasks, ends], **how)
        return done - {ends}, pending

    monkeypatch.setattr(asyncio, "wait", wait_until_both_run)
    files = await stored(redis, keys, jsonl(chat_line("a"), chat_line("b")))
    store = BatchStore(redis, keys, files, "g", 60_000)
    await store.create(msgspec.structs.replace(about(), expires_at=int(time.time()) + 1234), 2, "", None)
    await store.claim(1, ())
    requests = Silent()
    await BatchRun(parts(store, files, requests, 8), await store.find("batch_1", "o")).run()
    assert requests.asked == [1, 2]
    batch = await store.find("batch_1", "o")
    assert (batch.status, batch.completed, batch.failed) == ("expired", 0, 0)
    errors = b"".join([chunk async for chunk in files.chunks("file-err")])
    assert errors.count(b"batch_expired") == 2


async def test_results_that_find_no_room_in_files_are_bounded(
    redis: Redis, keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those beyond the window are given up and asked for again; no other line is asked for meanwhile."""

    class Long(Requests):
        again = most_again = 0

        async def ask(self, about: About, line: Line) -> Reply:
            is_again = line.number in self.asked
            self.again += is_again
            self.most_again = max(self.most_again, self.again)
            await super().ask(about, line)
            self.again -= is_again
            return Reply(200, "r", b'"' + b"x" * 900 + b'"')

    most = 4000
    monkeypatch.setattr("services.gateway.batches.window.MOST_BYTES", most)
    monkeypatch.setattr("services.gateway.batches.run.NO_ROOM_S", 0.001)
    count, slots = 30, 8
    whole = await stored(redis, keys, jsonl(*(chat_line(str(n)) for n in range(count))))
    taken = int(await redis.hget(keys.file_sizes(), "all") or 0)
    full = FileStore(redis, keys, msgspec.structs.replace(LIMITS, budget_bytes=taken + 500))
    store, requests = BatchStore(redis, keys, full, "g", 60_000), Long()
    await store.create(about(), count, "", None)
    await store.claim(1, ())
    run = BatchRun(parts(store, full, requests, slots), await store.find("batch_1", "o"))
    refused, finish_line = asyncio.Event(), store.finish_line
    tries: list[int] = []
    held: list[int] = []

    async def finishing(about: About, number: int, counter: str, result: bytes) -> bool:
        done = await finish_line(about, number, counter, result)
        held.append(run._window.bytes)
        tries.append(number)
        if len(tries) > 100:
            refused.set()
        return done

    monkeypatch.setattr(store, "finish_line", finishing)
    running = asyncio.create_task(run.run())
    await refused.wait()
    asked = list(requests.asked)
    assert len(asked) == len(set(asked)) <= slots
    assert max(held) <= most
    full.limits = whole.limits
    await running
    assert (await store.find("batch_1", "o")).completed == count
    assert b"".join([chunk async for chunk in full.chunks("file-out")]).count(b"\n") == count
    assert count < len(requests.asked) < 2 * count, "those that were given up"
    assert requests.most_again == 1, "room for one is no room for all"


async def test_a_result_that_was_written_is_not_one_that_waits_for_room(
    redis: Redis, keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While its line ends, another is refused: that one holds its result and tries again, as nobody else does."""
    written, go_on = asyncio.Event(), asyncio.Event()

    class Slow(Requests):
        async def ask(self, about: About, line: Line) -> Reply:
            await super().ask(about, line)
            if line.number == 2:
                await written.wait()
            return Reply(200, "r", b'"' + b"x" * 900 + b'"')

        async def forget(self, _about: About, number: int) -> None:
            if number == 1:
                written.set()
                await go_on.wait()

    monkeypatch.setattr("services.gateway.batches.window.MOST_BYTES", 1500)
    monkeypatch.setattr("services.gateway.batches.run.NO_ROOM_S", 0.001)
    files = await stored(redis, keys, jsonl(chat_line("a"), chat_line("b")))
    store, requests = BatchStore(redis, keys, files, "g", 60_000), Slow()
    await store.create(about(), 2, "", None)
    await store.claim(1, ())
    finish_line = store.finish_line
    tries: list[int] = []

    async def finishing(about: About, number: int, counter: str, result: bytes) -> bool:
        tries.append(number)
        if tries.count(number) == 1:
            return False
        if number == 2:
            go_on.set()
        return await finish_line(about, number, counter, result)

    monkeypatch.setattr(store, "finish_line", finishing)
    async with asyncio.timeout(PATIENCE_S):
        await BatchRun(parts(store, files, requests, 2), await store.find("batch_1", "o")).run()
    assert (await store.find("batch_1", "o")).completed == 2
    assert (tries, requests.asked) == ([1, 1, 2, 2], [1, 2])


async def test_expired_lines_take_no_room_that_files_do_not_have(redis: Redis, keys: Keys) -> None:
    whole = await stored(redis, keys, jsonl(*(chat_line(str(n)) for n in range(100))))
    over = msgspec.structs.replace(about(), expires_at=int(time.time()) - 1)
    taken = int(await redis.hget(keys.file_sizes(), "all") or 0)
    rooms = {"batch_1": (taken + 3000, LIMITS.owner_bytes), "batch_2": (LIMITS.budget_bytes, 10)}
    for batch_id, (budget, share) in rooms.items():
        limits = msgspec.structs.replace(LIMITS, budget_bytes=budget, owner_bytes=share)
        files = FileStore(redis, keys, limits)
        store = BatchStore(redis, keys, files, "g", 60_000)
        named = msgspec.structs.replace(over, id=batch_id, error_file_id=f"file-of-{batch_id}")
        await store.create(named, 100, "", None)
        await store.claim(1, ())
        await BatchRun(parts(store, files, Requests(), 8), await store.find(batch_id, "o")).run()
    first, second = [await store.find(batch_id, "o") for batch_id in rooms]
    assert first.status == second.status == "expired"
    assert int(await redis.hget(keys.file_sizes(), "all") or 0) <= taken + 3000
    assert 0 < first.expired < 100
    assert first.resource()["error_file_id"] == "file-of-batch_1"
    assert (await whole.find("file-of-batch_1", "o")).bytes > 0
    assert (second.expired, second.resource()["error_file_id"]) == (0, None), "a file that there is not"


async def test_a_batch_that_was_finalizing_when_its_gateway_died_completes_after_its_window(
    redis: Redis, keys: Keys
) -> None:
    files = await stored(redis, keys, jsonl(chat_line("a")))
    store = BatchStore(redis, keys, files, "g", 60_000)
    over = msgspec.structs.replace(about(), expires_at=int(time.time()) - 1)
    await store.create(over, 1, "", None)
    await store.claim(1, ())
    await store.move("batch_1", "in_progress")
    assert await store.finish_line(about(), 1, "completed", b"{}\n")
    await store.move("batch_1", "finalizing")
    await BatchRun(parts(store, files, Requests(), 8), await store.find("batch_1", "o")).run()
    assert (await store.find("batch_1", "o")).status == "completed"
    assert await store.claim(1, ()) == ([], []), "it is claimed for ever"


async def test_a_redis_that_refuses_ends_the_work_and_not_the_batch(redis: Redis, keys: Keys) -> None:
    files = await stored(redis, keys, jsonl(chat_line("a")))
    store = BatchStore(redis, keys, files, "g", 60_000)
    await store.create(about(), 1, "", None)
    await store.claim(1, ())
    await store.move("batch_1", "in_progress")
    await redis.delete(keys.file_chunk("file-in", 0))
    await redis.lpush(keys.file_chunk("file-in", 0), "of another type")
    requests = Requests()
    with pytest.raises(ResponseError):
        await BatchRun(parts(store, files, requests, 8), await store.find("batch_1", "o")).run()
    assert (await store.find("batch_1", "o")).status == "in_progress"
    assert requests.asked == []


async def test_a_gateway_that_was_paused_writes_nothing(redis: Redis, keys: Keys) -> None:
    files = await stored(redis, keys, jsonl(chat_line("a")))
    paused, other = (BatchStore(redis, keys, files, name, 60_000) for name in ("paused", "other"))
    await paused.create(about(), 1, "", None)
    assert await paused.claim(5, ()) == (["batch_1"], [])
    assert await other.claim(5, ()) == ([], [])
    await redis.delete(keys.batch_lease("batch_1"))  # it has expired
    assert await other.claim(5, ()) == (["batch_1"], [])
    with pytest.raises(LeaseLostError):
        await paused.finish_line(about(), 1, "completed", b"late\n")
    with pytest.raises(LeaseLostError):
        await paused.renew("batch_1")
    with pytest.raises(LeaseLostError):
        await paused.move("batch_1", "in_progress")
    await paused.release("batch_1")
    assert await other.renew("batch_1") == "validating"
    assert await files.size("file-out") is None


async def test_an_owner_has_its_part_of_the_places_while_others_wait(redis: Redis, keys: Keys) -> None:
    files = await stored(redis, keys, jsonl(chat_line("a")))
    store = BatchStore(redis, keys, files, "g", 60_000)
    held: list[str] = []

    async def create(owner: str, *names: str) -> None:
        for name in names:
            await store.create(msgspec.structs.replace(about(name), owner=owner), 1, "", None)
            await redis.zadd(keys.batches(), {name: len(await redis.zrange(keys.batches(), 0, -1))})

    async def look() -> tuple[list[str], list[str]]:
        claimed, given_up = await store.claim(4, held)
        for name in given_up:
            held.remove(name)
            await store.release(name)
        held.extend(claimed)
        assert len(held) <= 4
        return claimed, given_up

    await create("many", "m1", "m2", "m3", "m4", "m5", "m6")
    assert await look() == (["m1", "m2", "m3", "m4"], []), "nobody else waits"
    await create("other", "o1")
    assert await look() == (["o1"], ["m4"])
    assert await look() == ([], [])
    await create("other", "o2", "o3")
    assert await look() == (["o2"], ["m3"])
    await create("third", "t1")
    assert await look() == (["t1"], ["o2"]), "a third of four"
    assert await look() == ([], [])
    held.remove("t1")
    await store.forget("t1")
    assert await look() == (["o2"], []), "the parts are two again"


async def test_what_a_lost_reply_makes_redis_do_again_changes_nothing(redis: Redis, keys: Keys) -> None:
    files = await stored(redis, keys, jsonl(chat_line("a")))
    store = BatchStore(redis, keys, files, "g", 60_000)
    for _ in range(2):
        await store.create(about(), 1, "", None)
        assert await store.claim(5, ()) == (["batch_1"], [])
        assert await store.move("batch_1", "in_progress")
        assert await store.finish_line(about(), 1, "completed", b"{}\n")
        await files.write("file-up", "o", 0, b"piece")
    assert (await store.find("batch_1", "o")).completed == 1
    assert (await files.size("file-out"), await files.size("file-up")) == (3, 5)
    assert await store.listed("o") == ["batch_1"]


async def test_files_that_are_over_are_deleted_with_all_that_is_kept_of_them(redis: Redis, keys: Keys) -> None:
    files = await stored(redis, keys, jsonl(chat_line("a")))
    await files.write("file-up", "o", 0, b"of a gateway that died")
    await redis.zadd(keys.files(), {"file-in": 1, "file-up": 1})
    assert await files.listed("o") == []
    assert await redis.keys("*file*") == [b"test:files:sizes"]
    assert await redis.hgetall(keys.file_sizes()) == {b"all": b"0"}


async def test_bytes_that_cannot_be_read_are_the_failure_of_one_file_or_batch(redis: Redis, keys: Keys) -> None:
    files = await stored(redis, keys, jsonl(chat_line("a")))
    store = BatchStore(redis, keys, files, "g", 60_000)
    for name in ("batch_1", "batch_2"):
        await store.create(about(name), 1, "", None)
    await files.write("file-bad", "o", 0, b"x")
    await files.publish(msgspec.structs.replace(await files.find("file-in", "o"), id="file-bad"))
    await redis.hset(keys.file("file-bad"), "about", "{")
    await redis.hset(keys.batch("batch_1"), "total", "many")
    assert [file.id for file in await files.describe(await files.listed("o"))] == ["file-in"]
    assert [each.about.id for each in await store.describe(await store.listed("o"))] == ["batch_2"]
    for find in (lambda: files.find("file-bad", "o"), lambda: store.find("batch_1", "o")):
        with pytest.raises(RequestError) as refused:
            await find()
        assert refused.value.failure.status == 500
