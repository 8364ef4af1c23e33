"""A gateway dies at each named step of a batch, and another one brings it to the same end: no line twice, none lost."""

import asyncio
import json
import re
import time
from pathlib import Path

import msgspec
import pytest
from batch_files import chat_line, jsonl
from redis.asyncio import Redis
from test_batch_run import Requests, about, parts, stored

import services.gateway.batches.run as run_module
from services.gateway.batches.batch import About, Batch
from services.gateway.batches.files import FileStore
from services.gateway.batches.lines import Line
from services.gateway.batches.requests import Reply
from services.gateway.batches.run import BatchRun
from services.gateway.batches.store import BatchStore
from shared.bus.keys import Keys

LINES = 5
POINTS = sorted(set(re.findall(r'crash_point\("([^"]+)"\)', Path(run_module.__file__).read_text())))
# How often each end of a batch passes a step.
PASSED = {
    "completed": {"result": LINES, "status": 3, "publish": 2, "cancel": 0},
    "expired": {"result": LINES, "status": 1, "publish": 1, "cancel": 1},
    "cancelled": {"result": 0, "status": 1, "publish": 0, "cancel": 1},
}
CASES = [
    (end, point, times)
    for end, steps in PASSED.items()
    for point in POINTS
    for times in range(1, steps[point.split("_")[-1].partition(".")[0]] + 1)
]


class Killed(BaseException):
    """Death of a gateway, in one process: nothing is written behind it."""


class Answers(Requests):
    """Answers that are kept under the key of their line, the last of which is an error."""

    async def ask(self, about: About, line: Line) -> Reply:
        await super().ask(about, line)
        return Reply(400 if line.number == LINES else 200, f"r{line.number}", b'{"n": %d}' % line.number)


class World:
    """One batch, and gateways that die at a step."""

    def __init__(self, redis: Redis, keys: Keys, files: FileStore) -> None:
        self.redis, self.keys, self.files = redis, keys, files
        self.requests = Answers()

    async def gateway(self, name: str) -> None:
        """Work on the batch until it has ended, or the gateway dies."""
        store = BatchStore(self.redis, self.keys, self.files, name, 60_000)
        [batch_id], _ = await store.claim(1, ())
        batch = await store.read(batch_id)
        assert batch is not None
        await BatchRun(parts(store, self.files, self.requests, 2), batch).run()

    async def batch(self) -> Batch:
        return await BatchStore(self.redis, self.keys, self.files, "", 1).find("batch_1", "o")

    async def content(self, file_id: str) -> list[str]:
        """The custom ids of a file; none if there is no file."""
        if await self.files.size(file_id) is None:
            return []
        await self.files.find(file_id, "o")
        whole = b"".join([chunk async for chunk in self.files.chunks(file_id)])
        return sorted(json.loads(line)["custom_id"] for line in whole.splitlines())


def test_every_step_is_in_the_table() -> None:
    assert len(POINTS) == 8
    assert {point.split("_")[-1].partition(".")[0] for point in POINTS} == PASSED["completed"].keys()


@pytest.mark.parametrize(("end", "point", "times"), CASES)
async def test_another_gateway_brings_it_to_the_same_end(
    redis: Redis, keys: Keys, monkeypatch: pytest.MonkeyPatch, end: str, point: str, times: int
) -> None:
    world = World(redis, keys, await stored(redis, keys, jsonl(*(chat_line(str(n)) for n in range(LINES)))))
    one = about()
    if end == "expired":
        one = msgspec.structs.replace(one, expires_at=int(time.time()) - 1)
    store = BatchStore(redis, keys, world.files, "", 1)
    await store.create(one, LINES, "", None)
    if end == "cancelled":
        assert await store.cancel("batch_1")
    left = times

    def reach(at: str) -> None:
        nonlocal left
        left -= at == point
        if at == point and left == 0:
            raise Killed

    monkeypatch.setattr(run_module, "crash_point", reach)
    dying = asyncio.create_task(world.gateway("first"))
    await asyncio.wait([dying])
    assert dying.exception() is not None, "it has not died"
    assert left <= 0
    await redis.delete(keys.batch_lease("batch_1"))  # it expires
    if await redis.zcard(keys.batches()):
        await world.gateway("second")
    batch = await world.batch()
    assert batch.status == end
    assert await redis.exists(keys.batches(), keys.batch_lease("batch_1"), keys.batch_done("batch_1")) == 0
    output, errors = await world.content("file-out"), await world.content("file-err")
    names = [str(n) for n in range(LINES)]
    match end:
        case "completed":
            assert (output, errors) == (names[:-1], names[-1:])
            assert (batch.completed, batch.failed) == (LINES - 1, 1)
        case "expired":
            assert (output, errors) == ([], names)
            assert batch.expired == LINES
        case "cancelled":
            assert (output, errors, world.requests.asked) == ([], [], [])
    sizes = [await world.files.size(name) for name in ("file-in", "file-out", "file-err")]
    there = [size for size in sizes if size is not None]
    assert int(await redis.hget(keys.file_sizes(), "all") or 0) == sum(there) + 1024 * len(there)
