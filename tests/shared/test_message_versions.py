"""Versions of messages, with a build that has two: the table and the numbers are replaced."""

import ast
import asyncio
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from machine import PATIENCE_S
from redis.asyncio import Redis
from redis.exceptions import ConnectionError

from shared import message_codec, message_versions, service
from shared.bus import leases, work_stream
from shared.bus.keys import ENCODE, GENERATE, NEWER, Keys
from shared.bus.records import Record, Records
from shared.bus.streams import LogReader, send
from shared.bus.translation import holds_newer, translate_entries, translate_records
from shared.bus.work_stream import WorkStream
from shared.config import CommonSettings
from shared.errors import NewerVersionError, ProtocolError
from shared.message_codec import from_entry, from_record_value, record_version, to_entry, to_record_value
from shared.message_versions import Translation, WriteVersion
from shared.messages import Cancel, Encode, Failed, Generate, Output, Request, Sampling, TokenLogprob
from shared.service import Life

REQUEST = Request("r", "g", 0, 0.0, Sampling(seed=1), Output(thinking=False), form=b"f")
WORK = Generate(REQUEST, b"", 1)


def _renamed(before: str, after: str) -> Any:
    """From `form` to `layout`, in requests and what has them."""

    def rename(kind: str, value: Any) -> Any:
        if kind in ("Encode", "Generate"):
            return {**value, "request": rename("Request", value["request"])}
        if kind == "Request":
            return {(after if name == before else name): each for name, each in value.items()}
        return value

    return rename


@pytest.fixture
def two_versions(monkeypatch: pytest.MonkeyPatch) -> Iterator[WriteVersion]:
    """Version 1, which an older build writes, calls `layout` what this one calls `form`."""
    writes = WriteVersion()
    table = {2: Translation(_renamed("layout", "form"), _renamed("form", "layout"))}
    monkeypatch.setattr(message_versions, "TRANSLATIONS", table)
    for module in (message_versions, message_codec, leases, work_stream, service):
        monkeypatch.setattr(module, "VERSION", 2)
        monkeypatch.setattr(module, "WRITES", writes)
    return writes


def test_a_version_rises_late_and_falls_at_once(two_versions: WriteVersion) -> None:
    assert two_versions.number == 1
    assert not two_versions.settle(2, 0.0, 10.0)
    assert not two_versions.settle(1, 5.0, 10.0), "one that needs the old version was there"
    for now, announced, number in ((6.0, 1, 1), (15.9, 1, 1), (16.0, 2, 1), (17.0, 2, 2), (18.0, 2, 2)):
        assert not two_versions.settle(2, now, 10.0)
        assert (two_versions.announced, two_versions.number) == (announced, number), now
        two_versions.said = announced
    assert two_versions.settle(1, 19.0, 10.0)
    assert (two_versions.announced, two_versions.number) == (1, 1)


def test_who_comes_between_the_announcement_and_the_rise_undoes_it(two_versions: WriteVersion) -> None:
    two_versions.settle(2, 0.0, 10.0)
    two_versions.settle(2, 10.0, 10.0)
    assert two_versions.announced == 2
    two_versions.said = 2
    assert not two_versions.settle(1, 11.0, 10.0)
    assert (two_versions.announced, two_versions.number) == (1, 1)


def test_who_was_halted_for_longer_than_its_lease_writes_what_everybody_reads(two_versions: WriteVersion) -> None:
    """An older replica that came meanwhile could not see its lease, and did not wait for it."""
    two_versions.settled = 2
    two_versions.trusted_until = time.monotonic() + 3600
    assert to_entry(WORK)[b"v"] == b"2"
    two_versions.trusted_until = time.monotonic()
    assert to_entry(WORK)[b"v"] == b"1"


def test_both_versions_are_read(two_versions: WriteVersion) -> None:
    old = to_entry(WORK)
    assert (old[b"v"], b"layout" in old[b"m"], b"form" in old[b"m"]) == (b"1", True, False)
    record = to_record_value(REQUEST)
    two_versions.settled = 2
    new = to_entry(WORK)
    assert (new[b"v"], b"layout" in new[b"m"]) == (b"2", False)
    assert from_entry(old) == from_entry(new) == WORK
    assert from_record_value(Request, record) == from_record_value(Request, to_record_value(REQUEST)) == REQUEST
    assert to_record_value(REQUEST)[:2] == b"\xc1\x02"


class Clock:
    """A process that is halted for a minute whenever it looks at the time."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 60
        return self.now


async def test_what_is_written_at_once_is_of_one_version(
    redis: Redis, keys: Keys, two_versions: WriteVersion, monkeypatch: pytest.MonkeyPatch
) -> None:
    two_versions.settled, two_versions.trusted_until = 2, 90.0
    monkeypatch.setattr(message_versions, "time", SimpleNamespace(monotonic=Clock()))
    works = [Generate(msgspec.structs.replace(REQUEST, id=name), b"", 1) for name in "rs"]
    await Records(redis, keys).submit_once(GENERATE, works, "digest", "body", 9)
    entries = [fields for _, fields in await redis.xrange(keys.stream(GENERATE))]
    assert {fields[b"v"] for fields in entries} == {b"2"}
    assert [b"layout" in fields[b"m"] for fields in entries] == [False, False]


@pytest.mark.parametrize("m", [b"", b"\xc1", b"\x81\xa4type\xa8Generate", b"\x80"])
def test_damaged_bytes_of_the_older_version_are_told(two_versions: WriteVersion, m: bytes) -> None:
    with pytest.raises(ProtocolError):
        from_entry({b"v": b"1", b"m": m})


def test_what_is_newer_is_told_from_what_is_damaged() -> None:
    with pytest.raises(NewerVersionError):
        from_entry({b"v": b"2", b"m": b"?"})
    with pytest.raises(NewerVersionError):
        from_record_value(Request, b"\xc1\x02?")
    for version in (b"", b"0", b"x", b"9" * 30):
        with pytest.raises(ProtocolError) as error:
            from_entry({b"v": version, b"m": b"?"})
        assert not isinstance(error.value, NewerVersionError)


async def test_records_are_translated_for_an_older_replica(
    redis: Redis, keys: Keys, two_versions: WriteVersion
) -> None:
    records = Records(redis, keys)
    two_versions.settled = 2
    await records.submit(GENERATE, WORK)
    await records.write_journal([("r", 0, [5])], logprobs=[("r", [TokenLogprob(-1.0)])])
    await redis.delete(keys.stream(GENERATE))
    await redis.hset(keys.request("of nobody"), "cancelled", "1")  # type: ignore[misc]
    two_versions.settled = 1
    assert await holds_newer(redis, keys, [], [2])
    for _ in range(2):
        await translate_records(redis, keys)
    assert not await holds_newer(redis, keys, [], [2])
    data = await redis.hget(keys.request("r"), "request")  # type: ignore[misc]
    assert b"layout" in data
    assert data[0] != 0xC1
    record = (await records.get(["r"]))["r"]
    assert isinstance(record, Record)
    assert record.request == REQUEST
    assert await records.read_logprobs("r") == [TokenLogprob(-1.0)]


@pytest.mark.parametrize("damaged", [b"\xff\xff damaged \xc1", b"\x05", b"\xa1a", b"\x80"])
async def test_what_is_damaged_keeps_nothing_else_from_being_translated(
    redis: Redis, keys: Keys, two_versions: WriteVersion, damaged: bytes
) -> None:
    records = Records(redis, keys)
    two_versions.settled = 2
    await records.submit(GENERATE, WORK)
    await records.write_journal([("r", 0, [5])], logprobs=[("r", [TokenLogprob(-1.0)])])
    for name in map(str, range(9)):  # some of them are looked at before the good one
        await redis.hset(keys.request(name), "request", b"\xc1\x02" + damaged)  # type: ignore[misc]
        await redis.rpush(keys.logprobs(name), b"\xc1\x02" + damaged)  # type: ignore[misc]
    two_versions.settled = 1
    await translate_records(redis, keys)
    assert b"layout" in await redis.hget(keys.request("r"), "request")  # type: ignore[misc,operator]
    assert record_version(await redis.lindex(keys.logprobs("r"), 0)) == 1  # type: ignore[misc,arg-type]


class Idle:
    """A service of which only the life matters."""

    async def startup(self) -> None: ...

    async def serve(self) -> None:
        await asyncio.get_running_loop().create_future()

    drain = close = startup

    def load(self) -> dict[str, float]:
        return {}


class Stopped:
    """A registered script that waits before it is sent, with all its arguments encoded."""

    def __init__(self, script: Any) -> None:
        self.script = script
        self.reached, self.go_on = asyncio.Event(), asyncio.Event()

    async def __call__(self, **given: Any) -> Any:
        self.reached.set()
        await self.go_on.wait()
        return await self.script(**given)


async def test_a_lease_says_the_older_version_when_what_was_begun_in_the_newer_is_written_and_translated(
    redis: Redis, keys: Keys, two_versions: WriteVersion
) -> None:
    life = Life("gateway", Idle(), CommonSettings(redis_url="", model="", namespace="test", name="g"), redis)
    await life._lease.join("ready")
    life._joined = True
    two_versions.settled = 2
    await life._renew()
    records, engines = Records(redis, keys), Engines(redis, keys)
    stopped = records._submit = Stopped(records._submit)  # type: ignore[assignment]
    submitting = asyncio.create_task(records.submit(GENERATE, WORK))
    await stopped.reached.wait()
    await engines.start("old", 1)

    async def written_and_said() -> tuple[bytes, int]:
        await life._renew()
        await life._settle_version()
        [gateway] = await leases.live(redis, keys, "gateway")
        return to_entry(WORK)[b"v"], gateway.writes

    for _ in range(3):
        assert await written_and_said() == (b"1", 2), "the submission was encoded before"
    stopped.go_on.set()
    await submitting
    assert await written_and_said() == (b"1", 1)
    assert not await holds_newer(redis, keys, [], [2])
    assert b"layout" in await redis.hget(keys.request("r"), "request")  # type: ignore[misc,operator]


async def test_a_version_is_announced_before_it_is_written(
    redis: Redis, keys: Keys, two_versions: WriteVersion
) -> None:
    life = Life("gateway", Idle(), CommonSettings(redis_url="", model="", namespace="test", name="g"), redis)
    await life._lease.join("ready")
    life._joined, life._raise_after_s = True, 0.0
    seen = []
    for _ in range(3):
        await life._renew()
        await life._settle_version()
        [gateway] = await leases.live(redis, keys, "gateway")
        seen.append((two_versions.number, gateway.writes))
    assert seen == [(1, 2), (2, 2), (2, 2)]


async def test_a_version_that_could_not_be_announced_is_not_written(
    redis: Redis, keys: Keys, two_versions: WriteVersion, monkeypatch: pytest.MonkeyPatch
) -> None:
    life = Life("gateway", Idle(), CommonSettings(redis_url="", model="", namespace="test", name="g"), redis)
    await life._lease.join("ready")
    life._joined, life._raise_after_s = True, 0.0

    async def renew(*_: Any) -> None:
        raise ConnectionError("away")

    with monkeypatch.context() as patch:
        patch.setattr(life._lease, "renew", renew)
        for _ in range(3):
            with suppress(ConnectionError):
                await life._settle_version()
    assert two_versions.settled == 1
    await life._renew()
    await life._settle_version()
    [gateway] = await leases.live(redis, keys, "gateway")
    assert (two_versions.number, gateway.writes) == (1, 2)
    await life._settle_version()
    assert two_versions.number == 2


async def test_a_lease_is_renewed_while_much_is_translated(
    redis: Redis, keys: Keys, two_versions: WriteVersion, monkeypatch: pytest.MonkeyPatch
) -> None:
    translating, renewed, renewals = asyncio.Event(), asyncio.Event(), 0
    renew = leases.Lease.renew

    async def translate(*_: Any) -> None:
        translating.set()
        await asyncio.get_running_loop().create_future()

    async def counted(*given: Any) -> None:
        nonlocal renewals
        await renew(*given)
        renewals += translating.is_set()
        if renewals == 3:
            renewed.set()

    monkeypatch.setattr(service, "translate_records", translate)
    monkeypatch.setattr(leases.Lease, "renew", counted)
    await Engines(redis, keys).start("old", 1)
    two_versions.settled = 2
    settings = CommonSettings(redis_url="", model="", namespace="test", name="g", lease_ms=300)
    life = Life("gateway", Idle(), settings, redis)
    running = asyncio.create_task(life.run())
    async with asyncio.timeout(PATIENCE_S):
        await renewed.wait()
    life.stop.set()
    assert await running == 0


ENCODERS = {
    "to_entry",
    "to_entries",
    "to_record_value",
    "encode_logprob",
}
HELPERS = {"encode_logprob", "_flat", "_forwarding", "_recent_words"}  # encode for their callers
READERS = {"translated_entry"}  # encodes what it has read, for the translation


def _encoding(source: str) -> Iterator[tuple[str, bool]]:
    """Each function that encodes a message, and whether it is a `versioned_write`."""
    for function in ast.walk(ast.parse(source)):
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef) and function.name not in HELPERS | READERS:
            called = [node.func for node in ast.walk(function) if isinstance(node, ast.Call)]
            names = {each.id if isinstance(each, ast.Name) else getattr(each, "attr", "") for each in called}
            if names & (ENCODERS | HELPERS):
                decorators = {getattr(each, "id", "") for each in function.decorator_list}
                yield function.name, "versioned_write" in decorators


def test_whoever_encodes_a_message_is_a_versioned_write() -> None:
    """Otherwise it might be written after all had been translated."""
    planted = "async def late(m):\n    e = to_entry(m)\n    await retry(lambda: add(e))\n"
    assert list(_encoding(planted)) == [("late", False)]
    root = Path(message_versions.__file__).parents[1]
    files = [path for top in ("shared", "services", "cli") for path in sorted((root / top).rglob("*.py"))]
    found = [(path.name, *each) for path in files for each in _encoding(path.read_text())]
    assert [each for each in found if not each[2]] == []
    assert {("records.py", "submit", True), ("outbox.py", "send", True)} < set(found)


class Engines:
    """Members of the consumer group, whose leases say what they read."""

    def __init__(self, redis: Redis, keys: Keys) -> None:
        self.redis = redis
        self.keys = keys

    async def start(self, name: str, newest: int) -> WorkStream:
        await self.redis.sadd(self.keys.replicas("engine"), name)  # type: ignore[misc]
        await self.redis.set(self.keys.replica("engine", name), f'{{"state": "ready", "newest": {newest}}}')
        stream = WorkStream(self.redis, self.keys, GENERATE, "engine", name, 1)
        await stream.join()
        return stream

    async def die(self, name: str) -> None:
        await self.redis.delete(self.keys.replica("engine", name))


async def test_a_newer_entry_is_left_to_newer_replicas_and_is_no_delivery(redis: Redis, keys: Keys) -> None:
    engines = Engines(redis, keys)
    old, newer = await engines.start("old", 1), await engines.start("newer", 2)
    await redis.xadd(keys.stream(GENERATE), {"v": "2", "m": b"?", "r": "r"})
    await send(redis, keys.stream(GENERATE), WORK)
    assert [each.message for each in await old.read_new(9, 0)] == [WORK]
    for _ in range(3):
        assert await old.claim_abandoned(9) == ([], [], set(), 0), "it keeps nobody from reading"
    assert await redis.xlen(keys.quarantine(GENERATE)) == 0
    del newer
    [pending] = await redis.xpending_range(keys.stream(GENERATE), "engine", "-", "+", 9, NEWER)
    assert pending["times_delivered"] == 0


async def test_a_newer_replica_claims_what_was_left_to_it(redis: Redis, keys: Keys, two_versions: WriteVersion) -> None:
    engines = Engines(redis, keys)
    newer = await engines.start("newer", 2)
    two_versions.settled = 2
    entry_id = await send(redis, keys.stream(GENERATE), WORK)
    await redis.xreadgroup("engine", NEWER, {keys.stream(GENERATE): ">"})
    await redis.xclaim(keys.stream(GENERATE), "engine", NEWER, 0, [entry_id], retrycount=0, justid=True)
    [claimed] = (await newer.claim_abandoned(9)).claimed
    assert (claimed.message, claimed.attempts) == (WORK, 1)


async def test_when_no_newer_replica_lives_the_client_is_told(redis: Redis, keys: Keys) -> None:
    engines = Engines(redis, keys)
    old, _ = await engines.start("old", 1), await engines.start("newer", 2)
    await send(redis, keys.deltas("g"), Cancel(()))
    await redis.hset(keys.request("r"), mapping={"gateways": "g"})  # type: ignore[misc]
    await redis.xadd(keys.stream(GENERATE), {"v": "2", "m": b"?", "r": "r"})
    assert await old.read_new(9, 0) == []
    await engines.die("newer")
    assert (await old.claim_abandoned(9)).claimed == []
    [_, (_, _, told)] = await LogReader(redis, {keys.deltas("g"): "0"}).read(9, 0)
    assert isinstance(told, Failed)
    assert await redis.xlen(keys.stream(GENERATE)) == 0
    assert await redis.xlen(keys.quarantine(GENERATE)) == 1


async def test_who_leaves_translates_what_nobody_else_works_on(
    redis: Redis, keys: Keys, two_versions: WriteVersion
) -> None:
    engines = Engines(redis, keys)
    leaving, other = await engines.start("leaving", 2), await engines.start("other", 2)
    two_versions.settled = 2
    for n in range(4):
        await send(redis, keys.stream(GENERATE), Generate(REQUEST, bytes(4 * n), 1))
    await leaving.read_new(1, 0)
    await other.read_new(1, 0)
    two_versions.settled = 1
    await leaving.leave()
    entries = [fields for _, fields in await redis.xrange(keys.stream(GENERATE))]
    assert [fields[b"v"] for fields in entries] == [b"2", b"1", b"1", b"1"], "the other works on the first"
    assert sorted(len(from_entry(fields).prompt) for fields in entries) == [0, 4, 8, 12]  # type: ignore[union-attr]


async def test_a_replica_gives_up_what_it_works_on_for_an_older_one(
    redis: Redis, keys: Keys, two_versions: WriteVersion
) -> None:
    engines = Engines(redis, keys)
    newer, older = await engines.start("one", 2), await engines.start("older", 1)
    two_versions.settled = 2
    before = await send(redis, keys.stream(GENERATE), WORK)
    await newer.read_new(1, 0)
    assert await holds_newer(redis, keys, [], [2])
    two_versions.settled = 1
    await translate_entries(redis, keys, "gateway", "g")
    assert await holds_newer(redis, keys, [], [2]), "a replica that lives works on it"
    for _ in range(2):
        await translate_entries(redis, keys, "engine", "one")
    assert not await holds_newer(redis, keys, [], [2])
    [again] = await older.read_new(9, 0)
    assert (again.message, again.attempts) == (WORK, 1)
    assert (await newer.claim_abandoned(9)).lost == {before}


async def test_a_translated_entry_stays_the_one_whose_prompt_went_ahead(
    redis: Redis, keys: Keys, two_versions: WriteVersion
) -> None:
    work = WorkStream(redis, keys, ENCODE, "mm_encoder", "one", 3)
    await work.join()
    two_versions.settled = 2
    source = Encode(REQUEST, (b"",), ())
    await Records(redis, keys).submit(ENCODE, source)
    [delivery] = await work.read_new(1, 0)
    assert await work.ownership.forward_ahead(delivery.entry_id, source, Generate(REQUEST, b"", 1)) == "done"
    # An id is a time, so that of an entry in the other stream may be the same.
    [(_, prompt)] = await redis.xrange(keys.stream(GENERATE))
    await redis.delete(keys.stream(GENERATE))
    later = int(delivery.entry_id.split("-")[0]) + 1_000_000
    await redis.execute_command("XSETID", keys.stream(ENCODE), f"{later}-0")
    await redis.xadd(keys.stream(GENERATE), prompt, id=f"{later}-1")
    noted = await redis.hget(keys.request(REQUEST.id), "entry")
    two_versions.settled = 1
    await translate_entries(redis, keys, "mm_encoder", "one")
    [(entry_id, fields)] = await redis.xrange(keys.stream(ENCODE))
    assert fields[b"v"] == b"1"
    assert await redis.hget(keys.request(REQUEST.id), "ahead") == entry_id
    assert (await redis.hget(keys.request(REQUEST.id), "entry")).startswith(keys.stream(GENERATE).encode())
    assert noted is not None


async def test_newer_entries_are_found_on_whichever_page(redis: Redis, keys: Keys) -> None:
    for version in (*[1] * 1500, 2):
        await redis.xadd(keys.tokens(1), {"v": version, "m": b"?"})
    assert not await holds_newer(redis, keys, [0], [2])
    assert await holds_newer(redis, keys, [0, 1], [2])
    assert not await holds_newer(redis, keys, [0, 1], [3]), "of a version that no replica reads, it would stay for ever"
