import asyncio

import pytest
from redis.asyncio import Redis

from shared.bus.keys import ENCODE, GENERATE, Keys
from shared.bus.leases import Fence
from shared.bus.ownership import Ended
from shared.bus.records import Record, Records, Submission, UnreadableRecord
from shared.bus.streams import send
from shared.bus.work_stream import WorkStream
from shared.errors import FencedError, ProtocolError
from shared.message_codec import from_entry, to_record_value
from shared.messages import (
    Begin,
    Cancel,
    Deltas,
    Encode,
    Finish,
    Generate,
    Output,
    Request,
    Sampling,
    TokenLogprob,
    pack_ids,
)


def request(request_id: str = "r1") -> Request:
    return Request(
        id=request_id,
        gateway="gateway-1",
        shard=0,
        created=1.0,
        sampling=Sampling(seed=7),
        output=Output(thinking=True),
    )


def encode(request_id: str = "r1") -> Encode:
    return Encode(request(request_id), segments=(pack_ids([1]),), media=())


def generate(request_id: str = "r1") -> Generate:
    return Generate(request(request_id), prompt=pack_ids([1, 2]), max_tokens=5)


@pytest.fixture
def records(redis: Redis, keys: Keys) -> Records:
    return Records(redis, keys)


async def generates(redis: Redis, keys: Keys) -> list[object]:
    return [from_entry(fields) for _, fields in await redis.xrange(keys.stream(GENERATE))]


async def test_submit_makes_record_and_entry(redis: Redis, keys: Keys, records: Records) -> None:
    await records.submit(GENERATE, generate())
    assert await generates(redis, keys) == [generate()]
    assert await records.get(["r1", "absent"]) == {"r1": Record(request(), 0, False, (request().gateway,))}


async def test_a_key_submits_all_choices_once(redis: Redis, keys: Keys, records: Records) -> None:
    choices = [generate("r1"), generate("r1-1")]
    assert await records.submit_once(GENERATE, choices, "digest", "body", 60) is None
    assert await generates(redis, keys) == choices
    assert (await records.get(["r1", "r1-1"])).keys() == {"r1", "r1-1"}
    assert 0 < await redis.ttl(keys.idempotency("digest")) <= 60

    earlier = Submission("body", ("r1", "r1-1"))
    assert await records.submit_once(GENERATE, [generate("r2")], "digest", "another", 60) == earlier
    assert await records.submit_once(GENERATE, choices, "digest", "body", 60) is None  # sent again: its reply was lost
    assert await generates(redis, keys) == choices
    assert await records.get(["r2"]) == {}
    assert await records.submit_once(GENERATE, [generate("r2")], "digest 2", "body", 60) is None


async def test_a_key_is_free_again_when_one_of_its_requests_is_gone(records: Records) -> None:
    choices = [generate("r1"), generate("r1-1")]
    assert await records.submit_once(GENERATE, choices, "digest", "body", 60) is None
    await records.delete(["r1-1"])
    assert await records.submit_once(GENERATE, [generate("r2")], "digest", "body", 60) is None
    assert await records.submit_once(GENERATE, [generate("r3")], "digest", "x", 60) == Submission("body", ("r2",))


@pytest.mark.parametrize("damaged", [b"{", b"\xff", b'{"body_hash":1,"request_ids":["r2"]}'])
async def test_a_key_that_is_damaged_hides_no_other(redis: Redis, keys: Keys, records: Records, damaged: bytes) -> None:
    assert await records.submit_once(GENERATE, [generate("r1")], "digest", "body", 60) is None
    await redis.set(keys.idempotency("damaged"), damaged)
    assert await records.submitted(["damaged", "digest", "absent"]) == ["r1"]


async def test_of_two_who_use_a_key_at_once_one_submits(redis: Redis, keys: Keys, records: Records) -> None:
    both = [records.submit_once(ENCODE, [encode(name)], "digest", "body", 60) for name in ("r1", "r2")]
    first, second = await asyncio.gather(*both)
    assert [first, second].count(None) == 1
    assert await redis.xlen(keys.stream(ENCODE)) == 1


async def test_exists(records: Records) -> None:
    await records.submit(GENERATE, generate("r1"))
    assert await records.exists(["r1", "absent"]) == {"r1"}
    assert await records.exists([]) == set()


async def test_cancel_marks_existing_records_and_tells_everyone_once(
    redis: Redis, keys: Keys, records: Records
) -> None:
    await records.submit(GENERATE, generate())
    for _ in range(2):
        await records.cancel(["absent", "r1"])
    assert (await records.get(["r1"]))["r1"].cancelled
    assert not await redis.exists(keys.request("absent"))
    told = [from_entry(fields) for _, fields in await redis.xrange(keys.control())]
    assert told == [Cancel(("absent", "r1"))]


async def test_cancel_of_ended_requests_is_silent(redis: Redis, keys: Keys, records: Records) -> None:
    await records.cancel(["absent"])
    await records.cancel([])
    assert not await redis.exists(keys.control())


async def test_journal_is_written_in_place(records: Records) -> None:
    await records.submit(GENERATE, generate("r1"))
    await records.submit(GENERATE, generate("r2"))
    assert await records.read_journal("r1") == []
    assert await records.write_journal([("r1", 0, [10, 11, 12]), ("r2", 0, [103423])]) == []
    assert await records.write_journal([("r1", 2, [12, 13]), ("r1", 0, [10])]) == []  # a replay, overlapping
    assert await records.read_journal("r1") == [10, 11, 12, 13]
    assert await records.read_journal("r2") == [103423]


async def test_journal_never_has_a_hole(records: Records) -> None:
    await records.submit(GENERATE, generate("r1"))
    await records.submit(GENERATE, generate("r2"))
    assert await records.write_journal([("r1", 1, [5]), ("r2", 0, [6])]) == ["r1"]
    assert await records.read_journal("r1") == []
    assert await records.read_journal("r2") == [6]


async def test_journal_without_record_is_not_written(redis: Redis, keys: Keys, records: Records) -> None:
    assert await records.write_journal([("gone", 0, [5])]) == []
    assert await records.write_journal([]) == []
    assert not await redis.exists(keys.journal("gone"))


async def test_what_goes_into_the_record_with_the_journal(records: Records) -> None:
    begin, later = Begin("r1", 1, 0, 7, 3, 2, 1), Begin("r1", 2, 5, 7, 3, 2, 1)
    await records.submit(GENERATE, generate("r1"))
    assert await records.write_journal([("r1", 0, [10]), ("gone", 0, [1])], [begin]) == []
    assert (await records.get(["r1"]))["r1"].begin == begin
    assert await records.write_journal([("r1", 9, [10])], [later]) == ["r1"]
    assert (await records.get(["r1"]))["r1"].begin == begin  # promises no tokens that are not there
    assert await records.write_journal([("r1", 1, [])], [later]) == []
    assert (await records.get(["r1"]))["r1"].begin == later
    assert await records.read_journal("r1") == [10]


async def test_log_probabilities_stand_beside_the_tokens(redis: Redis, keys: Keys, records: Records) -> None:
    values = [TokenLogprob(-n / 2, ((n, -0.5),)) for n in range(5)]
    for name in ("r1", "r2", "r3"):
        await records.submit(GENERATE, generate(name))
    writes = [("r1", 0, [10, 11]), ("r2", 0, [20]), ("r3", 0, [30])]
    assert await records.write_journal(writes, logprobs=[("r1", values[:2]), ("r3", [None])]) == []
    assert await records.write_journal([("r1", 1, [11, 12, 13])], logprobs=[("r1", values[1:4])]) == []
    assert await records.write_journal([("r1", 1, [11])], logprobs=[("r1", values[1:2])]) == []
    assert await records.read_logprobs("r1") == values[:4]
    assert await records.read_logprobs("r2") == []
    assert await records.read_logprobs("r3") == [None]
    await redis.ltrim(keys.logprobs("r1"), 0, 1)  # what a loss of the newest writes does
    assert await records.write_journal([("r1", 4, [14])], logprobs=[("r1", values[4:])]) == ["r1"]
    assert await records.write_journal([("r1", 0, [10, 11, 12, 13, 14])], logprobs=[("r1", values)]) == []
    assert await records.read_logprobs("r1") == values
    await records.delete(["r1", "r2", "r3"])
    assert await redis.keys() == [keys.stream(GENERATE).encode()]


async def test_an_answer_that_is_kept_expires_as_a_whole(redis: Redis, keys: Keys, records: Records) -> None:
    nobody = Fence(keys, "", {})
    await records.submit(GENERATE, generate())
    await records.write_journal([("r1", 0, [1])], logprobs=[("r1", [None])])
    await records.retain([("r1", Finish("stop", 2), 60.0), ("gone", Finish("stop"), 60.0)], nobody)
    record = (await records.get(["r1"]))["r1"]
    assert record.finish == Finish("stop", 2)
    for key in (keys.request("r1"), keys.journal("r1"), keys.logprobs("r1")):
        assert 0 < await redis.pttl(key) <= 60_000
    assert not await redis.exists(keys.request("gone"))

    await records.cancel(["r1"])  # too late
    assert (await records.get(["r1"]))["r1"] == record
    assert not await redis.exists(keys.control())


@pytest.mark.parametrize("first", [True, False], ids=["before the end", "after it"])
async def test_an_answer_that_is_kept_elsewhere_expires_earlier(
    redis: Redis, keys: Keys, records: Records, first: bool
) -> None:
    await records.submit(GENERATE, generate("r1"))
    if first:
        await records.shorten("r1", 5.0)
    await records.retain([("r1", Finish("stop"), 1000.0)], Fence(keys, "", {}))
    if not first:
        await records.shorten("r1", 5.0)
    assert 0 < await redis.pttl(keys.request("r1")) <= 5000
    await records.shorten("gone", 5.0)
    assert not await redis.exists(keys.request("gone"))


async def test_where_deltas_go_is_kept(redis: Redis, keys: Keys, records: Records) -> None:
    async def gateways() -> tuple[str, ...]:
        return (await records.get(["r1", "gone"]))["r1"].gateways

    first = request().gateway
    await records.submit(GENERATE, generate())
    assert await gateways() == (first,)
    for _ in range(2):
        await records.attach(["r1", "gone"], "g2")
        assert await gateways() == (first, "g2")
    await records.attach(["r1"], first)
    assert await gateways() == ("g2", first)
    assert not await redis.exists(keys.request("gone"))


async def test_who_reads_last_is_told_so(redis: Redis, keys: Keys, records: Records) -> None:
    first = request().gateway
    await records.submit(GENERATE, generate())
    for gateway in ("g2", "dead"):
        await records.attach(["r1"], gateway)
    for gateway in (first, "g2"):
        await send(redis, keys.deltas(gateway), Deltas(()))
    assert await records.detach(["gone", "r1"], "g2") == []
    assert (await records.get(["r1"]))["r1"].gateways == (first, "dead")
    assert await records.detach(["gone", "r1"], first) == ["r1"]
    assert await records.detach(["r1"], "g2") == ["r1"]  # again: it has none
    assert not await redis.exists(keys.request("gone"))


async def test_who_lost_its_shards_writes_nothing(redis: Redis, keys: Keys, records: Records) -> None:
    await records.submit(GENERATE, generate())
    await records.write_journal([("r1", 0, [1])])
    await redis.hset(keys.shards(), mapping={"0": "4 someone", "1": "1 me"})
    before = await contents(redis)
    lost = Fence(keys, "me", {1: 1, 0: 3})
    writes = [
        records.cancel(["r1"], lost),
        records.write_journal([("r1", 0, [9])], fence=lost),
        records.retain([("r1", Finish("stop"), 1.0)], lost),
        records.delete(["r1"], lost),
    ]
    assert all(isinstance(result, FencedError) for result in await asyncio.gather(*writes, return_exceptions=True))
    assert await contents(redis) == before


async def contents(redis: Redis) -> dict[object, object]:
    return {key: await redis.dump(key) for key in await redis.keys()}


async def test_delete_leaves_nothing(redis: Redis, keys: Keys, records: Records) -> None:
    await records.submit(GENERATE, generate())
    await records.write_journal([("r1", 0, [1])])
    await records.delete(["r1", "absent"])
    await records.delete([])
    assert await redis.keys() == [keys.stream(GENERATE).encode()]


async def test_scripts_survive_a_script_flush(redis: Redis, records: Records) -> None:
    await records.submit(GENERATE, generate())
    await records.delete(["absent"])
    await redis.script_flush()
    await records.delete(["r1"])
    assert await records.get(["r1"]) == {}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("request", b"\xc1"),
        ("request", b""),
        ("begin", b"?"),
        ("finish", b"\x81"),
        ("epoch", b"one"),
        ("gateways", b"\xff"),
    ],
)
async def test_a_damaged_record_hurts_no_other(
    redis: Redis, keys: Keys, records: Records, field: str, value: bytes
) -> None:
    await records.submit(GENERATE, generate("good"))
    await records.submit(GENERATE, generate("bad"))
    await redis.hset(keys.request("bad"), field, value)
    found = await records.get(["good", "bad"])
    assert isinstance(found["good"], Record)
    bad = found["bad"]
    assert isinstance(bad, UnreadableRecord)
    assert bad.reason
    assert bad.epoch == 0
    assert bad.gateways == (("\ufffd",) if field == "gateways" else ("gateway-1",))


async def test_a_record_without_its_request_is_unreadable(redis: Redis, keys: Keys, records: Records) -> None:
    await redis.hset(keys.request("bad"), "epoch", "1")
    assert await records.get(["bad"]) == {}, "nothing was submitted"


async def test_damaged_journals_are_told(redis: Redis, keys: Keys, records: Records) -> None:
    await redis.set(keys.journal("r1"), b"12345")
    with pytest.raises(ProtocolError, match="5 bytes"):
        await records.read_journal("r1")
    await redis.rpush(keys.logprobs("r1"), b"\xc1")
    with pytest.raises(ProtocolError):
        await records.read_logprobs("r1")


@pytest.mark.parametrize(
    "value", [b"{", b"1", b"{}", b'{"request_ids": ["r0"]}', b'{"body_hash": "x", "request_ids": [1]}']
)
async def test_a_damaged_idempotency_key_is_void(redis: Redis, keys: Keys, records: Records, value: bytes) -> None:
    await records.submit(GENERATE, generate("r0"))
    await redis.set(keys.idempotency("digest"), value)
    assert await records.submit_once(GENERATE, [generate("r1")], "digest", "body", 60) is None
    assert await records.submit_once(GENERATE, [generate("r2")], "digest", "body", 60) == Submission("body", ("r1",))


async def test_entries_name_their_request(redis: Redis, keys: Keys, records: Records) -> None:
    await records.submit(GENERATE, generate("r1"))
    await records.submit_once(GENERATE, [generate("r2"), generate("r2-1")], "digest", "body", 60)
    assert [fields[b"r"] for _, fields in await redis.xrange(keys.stream(GENERATE))] == [b"r1", b"r2", b"r2-1"]


async def test_a_record_of_another_type_hurts_no_other(redis: Redis, keys: Keys, records: Records) -> None:
    await records.submit(GENERATE, generate("good"))
    await redis.set(keys.request("bad"), "oops")
    both, fence = ["bad", "good"], Fence(keys, "", {})
    assert {name: type(record) for name, record in (await records.get(both)).items()} == {
        "bad": UnreadableRecord,
        "good": Record,
    }
    await records.attach(both, "gateway-2")
    assert await records.detach(both, "gateway-2") == ["good"], "no gateway lives here"
    await records.cancel(both)
    assert await records.write_journal([("bad", 0, [1]), ("good", 0, [2])]) == []
    await records.retain([(name, Finish("stop"), 60.0) for name in both], fence)
    good = (await records.get(both))["good"]
    assert isinstance(good, Record)
    assert (good.cancelled, good.finish) == (True, Finish("stop"))
    await records.delete(both)
    assert await records.get(both) == {}


async def test_journals_of_another_type_are_damaged_and_written_anew(
    redis: Redis, keys: Keys, records: Records
) -> None:
    await records.submit(GENERATE, generate("r1"))
    for key in (keys.journal("r1"), keys.logprobs("r1")):
        await redis.sadd(key, "oops")
    for read in (records.read_journal, records.read_logprobs):
        with pytest.raises(ProtocolError, match="WRONGTYPE"):
            await read("r1")
    logprobs = [("r1", [None])]
    assert await records.write_journal([("r1", 5, [6])], logprobs=logprobs) == ["r1"], "there is a hole"
    assert await records.write_journal([("r1", 0, [6])], logprobs=logprobs) == []
    assert (await records.read_journal("r1"), await records.read_logprobs("r1")) == ([6], [None])


async def test_an_idempotency_key_of_another_type_is_void(redis: Redis, keys: Keys, records: Records) -> None:
    await redis.sadd(keys.idempotency("digest"), "oops")
    assert await records.submit_once(GENERATE, [generate("r1")], "digest", "body", 60) is None
    assert await records.submit_once(GENERATE, [generate("r2")], "digest", "body", 60) == Submission("body", ("r1",))


async def test_a_request_whose_entry_is_gone_is_lost_unless_a_stage_has_ended_it(
    redis: Redis, keys: Keys, records: Records
) -> None:
    names = ["ended", "taken", "waiting"]
    for name in names:
        await records.submit(GENERATE, generate(name))
    assert await records.lost(names) == set(), "no engine has come yet"
    stream = WorkStream(redis, keys, GENERATE, "engine", "e", 3)
    await stream.join()
    ended, taken = await stream.read_new(2, 0)
    await stream.finish([Ended(ended.entry_id, "ended", None)])
    assert await records.lost(names) == set()
    await redis.xack(keys.stream(GENERATE), "engine", taken.entry_id)
    assert await records.lost(names) == {"taken"}, "somebody has acked it"
    await redis.xgroup_destroy(keys.stream(GENERATE), "engine")
    assert await records.lost(names) == set(), "the next group begins with the first entry"
    await redis.delete(keys.stream(GENERATE))
    assert await records.lost(names) == {"taken", "waiting"}
    await records.submit(GENERATE, generate("new"))
    assert await records.lost([*names, "new"]) == {"taken", "waiting"}
    await redis.set(keys.stream(GENERATE), "oops")
    assert await records.lost([*names, "new"]) == {"taken", "waiting", "new"}


async def test_an_entry_is_known_wherever_it_went(redis: Redis, keys: Keys, records: Records) -> None:
    await records.submit(ENCODE, encode("r1"))
    encoding = WorkStream(redis, keys, ENCODE, "mm_encoder", "m", 3)
    await encoding.join()
    [delivery] = await encoding.read_new(1, 0)
    assert await encoding.ownership.forward(delivery.entry_id, encode("r1"), generate("r1")) == "done"
    assert await records.lost(["r1"]) == set()
    generating = WorkStream(redis, keys, GENERATE, "engine", "e", 3)
    await generating.join()
    [delivery] = await generating.read_new(1, 0)
    assert await generating.ownership.send_back(delivery.entry_id, "r1") == "done"
    assert await records.lost(["r1"]) == set()
    await redis.delete(keys.stream(ENCODE))
    assert await records.lost(["r1"]) == {"r1"}


# What replicas of builds that note no entries do to a record, in Lua's place.
OLD_FORWARD = {"encode": to_record_value(encode()), "made": b"digest"}


async def moved_by_an_old_build(redis: Redis, keys: Keys, stream: WorkStream, entry_id: str, to: str) -> None:
    await stream.ownership.ack([entry_id])
    await send(redis, keys.stream(to), generate("r1") if to == GENERATE else encode("r1"))


async def test_nobody_calls_a_request_lost_that_an_old_build_has_moved(
    redis: Redis, keys: Keys, records: Records
) -> None:
    """An update begins with the gateways: the entry that they note is gone when an old mm_encoder forwards it."""
    await records.submit(ENCODE, encode("r1"))
    encoding = WorkStream(redis, keys, ENCODE, "mm_encoder", "m", 3)
    generating = WorkStream(redis, keys, GENERATE, "engine", "e", 3)
    for stream in (encoding, generating):
        await stream.join()
    [delivery] = await encoding.read_new(1, 0)
    await moved_by_an_old_build(redis, keys, encoding, delivery.entry_id, GENERATE)
    await redis.hset(keys.request("r1"), mapping=OLD_FORWARD)  # type: ignore[arg-type]
    assert await records.lost(["r1"]) == set()

    [delivery] = await generating.read_new(1, 0)
    await generating.ownership.raise_epochs([(delivery.entry_id, "r1")])  # a new engine, which sends it back
    assert await generating.ownership.send_back(delivery.entry_id, "r1") == "done"
    [delivery] = await encoding.read_new(1, 0)
    await moved_by_an_old_build(redis, keys, encoding, delivery.entry_id, GENERATE)
    await redis.hset(keys.request("r1"), mapping=OLD_FORWARD)  # type: ignore[arg-type]
    assert await records.lost(["r1"]) == set()


async def test_nobody_calls_a_request_lost_that_an_old_engine_may_have_ended(
    redis: Redis, keys: Keys, records: Records
) -> None:
    await records.submit(GENERATE, generate("r1"))
    generating = WorkStream(redis, keys, GENERATE, "engine", "e", 3)
    await generating.join()
    [delivery] = await generating.read_new(1, 0)
    await redis.hincrby(keys.request("r1"), "epoch", 1)  # its claim
    await generating.ownership.ack([delivery.entry_id])  # its end; the Finish is in the tokens stream
    assert await records.lost(["r1"]) == set()


async def test_a_claimed_request_is_lost_with_its_entry(redis: Redis, keys: Keys, records: Records) -> None:
    await records.submit(GENERATE, generate("r1"))
    generating = WorkStream(redis, keys, GENERATE, "engine", "e", 3)
    await generating.join()
    [delivery] = await generating.read_new(1, 0)
    await generating.ownership.raise_epochs([(delivery.entry_id, "r1")])
    assert await records.lost(["r1"]) == set()
    await redis.delete(keys.stream(GENERATE))
    assert await records.lost(["r1"]) == {"r1"}
