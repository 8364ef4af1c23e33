"""`millrace quarantine`: entries that real services put there, on a real Redis."""

import asyncio
import json
import time

import msgspec
import pytest
from machine import PATIENCE_S
from redis.asyncio import Redis

from cli.main import main
from cli.redis_users import sign_in
from services.gateway.request import answer_format
from services.gateway.request.answer_format import AnswerFormat
from shared.bus.blobs import EMBEDS, MEDIA, Blobs
from shared.bus.keys import ENCODE, GENERATE, Keys
from shared.bus.leases import COUNT
from shared.bus.records import Records
from shared.message_codec import from_entry, to_entry
from shared.messages import Encode, Generate, Grammar, Media, MediaSpan, Output, Request, Sampling, pack_ids

SECRET = "what the client wrote"
CREATED = 1_700_000_000.0
REQUEST = Request(
    id="00112233445566aa-1",
    gateway="gone",
    shard=3,
    created=CREATED,
    sampling=Sampling(seed=7, temperature=0.5),
    output=Output(thinking=True, stop=(SECRET,)),
    deadline=CREATED + 120,
    form=answer_format.encode(AnswerFormat(n=2, owner="o", key="k")),
)
GENERATED = Generate(REQUEST, pack_ids([5, 6, 7]), 40)
SPAN = MediaSpan("image", "hash", 0, 1, (1, 2, 2))
SHOWN = Generate(REQUEST, pack_ids([5, 6, 7]), 40, (SPAN,))
ENCODED = Encode(REQUEST, (pack_ids([1]), pack_ids([2])), (Media("image", "messages[0]", blob="up-0"),))


async def put(redis: Redis, keys: Keys, stream: str, message: Encode | Generate) -> str:
    """Quarantine it, as shared/bus/ownership.py does; returns the entry's name."""
    fields = {b"reason": b"delivered 4 times", b"attempts": b"4", **to_entry(message)}
    entry_id = await redis.xadd(keys.quarantine(stream), fields)  # type: ignore[arg-type]
    return f"{stream}/{entry_id.decode()}"


class Command:
    """`millrace quarantine`, its exit status and what it said."""

    def __init__(self, redis_url: str, capsys: pytest.CaptureFixture[str]) -> None:
        self._where = ["--redis-url", redis_url, "--namespace", "test"]
        self._capsys = capsys

    async def __call__(self, *words: str) -> tuple[int, str, str]:
        status = await asyncio.to_thread(main, ["quarantine", *words, *self._where])
        return status, *self._capsys.readouterr()


@pytest.fixture
def quarantine(redis_url: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    # Handlers of signals are the main thread's, and the command runs beside the test's event loop.
    monkeypatch.setattr("cli.main.signal.signal", lambda *_: None)
    return Command(sign_in(redis_url, "operator"), capsys)


async def test_nothing_is_there(quarantine: Command) -> None:
    assert await quarantine("list") == (0, "the quarantine is empty\n", "")
    assert await quarantine("drop", "--all") == (0, "", "")


async def test_what_is_there(quarantine: Command, redis: Redis, keys: Keys) -> None:
    generate, encode = await put(redis, keys, GENERATE, GENERATED), await put(redis, keys, ENCODE, ENCODED)
    broken = await redis.xadd(keys.quarantine(GENERATE), {b"reason": b"of version 9", b"attempts": b"1", b"v": b"9"})
    status, out, _ = await quarantine("list")
    assert status == 0
    first, second, third = out.splitlines()
    assert first.startswith(f"{encode}  20")
    assert second.startswith(f"{generate}  20")
    assert second.endswith("chatcmpl-00112233445566aa choice 1  delivered 4 times")
    assert third.startswith(f"{GENERATE}/{broken.decode()}  ")
    assert third.endswith("  unreadable  of version 9")


async def test_what_an_entry_is_without_what_its_client_wrote(quarantine: Command, redis: Redis, keys: Keys) -> None:
    generate, encode = await put(redis, keys, GENERATE, SHOWN), await put(redis, keys, ENCODE, ENCODED)
    status, out, _ = await quarantine("show", generate, encode)
    assert status == 0
    for expected in ("delivered 4 times", "2023-11-14T22:13:20Z", "2023-11-14T22:15:20Z", "seed 7", "at most 40 more"):
        assert expected in out
    assert "media        image" in out
    assert SECRET not in out
    assert "[5,6,7]" not in out
    _, out, _ = await quarantine("show", generate, encode, "--body")
    assert SECRET in out
    assert '"prompt":[5,6,7]' in out
    assert '"segments":[[1],[2]]' in out


async def test_what_a_client_wrote_reaches_no_terminal_as_a_command(
    quarantine: Command, redis: Redis, keys: Keys
) -> None:
    stop = "\x1b[2J \x9b2J \u202e \U000e0001 \xe4\U0001f600"
    request = msgspec.structs.replace(REQUEST, output=Output(thinking=True, stop=(stop,)))
    name = await put(redis, keys, GENERATE, msgspec.structs.replace(GENERATED, request=request))
    _, out, _ = await quarantine("show", name, "--body")
    assert all(line.isprintable() for line in out.split("\n"))
    body = json.loads(out.partition("body")[2])
    assert body["request"]["output"]["stop"] == [stop]


async def test_an_unreadable_entry_is_shown_and_does_not_run(quarantine: Command, redis: Redis, keys: Keys) -> None:
    broken = await redis.xadd(keys.quarantine(ENCODE), {b"reason": b"of version 9", b"attempts": b"1", b"v": b"9"})
    name = f"{ENCODE}/{broken.decode()}"
    assert "of version 9" in (await quarantine("show", name, "--body"))[1]
    status, _, told = await quarantine("retry", name)
    assert (status, told) == (1, f"{name}: it cannot be read, so it cannot run again\n")


async def test_an_entry_runs_again_as_a_request_of_its_own(quarantine: Command, redis: Redis, keys: Keys) -> None:
    name = await put(redis, keys, GENERATE, GENERATED)
    await redis.hset(keys.shards(), COUNT, "8")
    status, out, _ = await quarantine("retry", name)
    assert status == 0
    ((_, fields),) = await redis.xrange(keys.stream(GENERATE))
    again = from_entry(fields)
    assert isinstance(again, Generate)
    assert (again.prompt, again.max_tokens, again.request.sampling) == (GENERATED.prompt, 40, REQUEST.sampling)
    assert f"runs again as chatcmpl-{again.request.id};" in out
    assert again.request.id != REQUEST.id
    assert again.request.shard in range(8)
    assert again.request.created == pytest.approx(time.time(), abs=PATIENCE_S)
    assert again.request.deadline == pytest.approx(again.request.created + 120)
    assert again.request.retain_s == 3600
    assert answer_format.decode(again.request.form) == AnswerFormat(owner="o")
    record = (await Records(redis, keys).get([again.request.id]))[again.request.id]
    assert (record.request, record.epoch) == (again.request, 0)
    assert await redis.xlen(keys.quarantine(GENERATE)) == 0


async def test_beside_an_older_build_nothing_runs_again_that_it_would_do_otherwise(
    quarantine: Command, redis: Redis, keys: Keys
) -> None:
    sampling = Sampling(seed=7, grammar=Grammar("{}", "response_format"))
    guided = msgspec.structs.replace(REQUEST, sampling=sampling)
    name = await put(redis, keys, GENERATE, msgspec.structs.replace(GENERATED, request=guided))
    plain = await put(redis, keys, GENERATE, GENERATED)
    await redis.hset(keys.shards(), COUNT, "8")
    await redis.sadd(keys.replicas("engine"), "old")
    await redis.set(keys.replica("engine", "old"), json.dumps({"service": "engine", "name": "old", "state": "ready"}))
    status, out, told = await quarantine("retry", name, plain)
    assert (status, out.startswith(f"{plain}: runs again")) == (1, True)
    why = "replicas of an older build live, which would leave out grammar"
    assert told == f"{name}: it cannot run again yet: {why}\n"
    assert [await redis.xlen(keys.quarantine(GENERATE)), await redis.xlen(keys.stream(GENERATE))] == [1, 1]
    await redis.delete(keys.replica("engine", "old"))
    assert (await quarantine("retry", name))[0] == 0
    assert await redis.xlen(keys.stream(GENERATE)) == 2


async def test_media_that_are_gone(quarantine: Command, redis: Redis, keys: Keys) -> None:
    names = [await put(redis, keys, ENCODE, ENCODED), await put(redis, keys, GENERATE, SHOWN)]
    await redis.hset(keys.shards(), COUNT, "8")
    status, _, told = await quarantine("retry", *names)
    assert status == 1
    assert f"{names[0]}: it cannot run again: the uploaded image is gone." in told
    assert f"{names[1]}: it cannot run again: the embeddings of its image are gone." in told
    assert await redis.xlen(keys.quarantine(ENCODE)) == 1
    blobs = Blobs(redis, keys, 60, 1 << 20)
    await blobs.put(MEDIA, "up-0", b"pixels")
    await blobs.put(EMBEDS, "hash", b"rows")
    assert (await quarantine("retry", "--all"))[0] == 0
    assert [await redis.xlen(keys.stream(stream)) for stream in (ENCODE, GENERATE)] == [1, 1]


async def test_a_deployment_that_never_ran(quarantine: Command, redis: Redis, keys: Keys) -> None:
    name = await put(redis, keys, GENERATE, GENERATED)
    status, _, told = await quarantine("retry", name)
    assert (status, "no postproc has ever run here" in told) == (1, True)
    assert await redis.xlen(keys.quarantine(GENERATE)) == 1


async def test_entries_are_dropped_one_by_one_or_all(quarantine: Command, redis: Redis, keys: Keys) -> None:
    names = [await put(redis, keys, GENERATE, GENERATED) for _ in range(3)]
    assert await quarantine("drop", names[0]) == (0, f"{names[0]}: dropped\n", "")
    assert await redis.xlen(keys.quarantine(GENERATE)) == 2
    status, _, told = await quarantine("drop", names[0], names[1])
    assert (status, told) == (1, f"{names[0]}: no such entry (any more)\n")
    assert await redis.xlen(keys.quarantine(GENERATE)) == 1
    assert (await quarantine("drop", "--all"))[0] == 0
    assert await redis.xlen(keys.quarantine(GENERATE)) == 0


@pytest.mark.parametrize("name", ["1-1", "control/1-1", "generate/x", "generate/1", "generate/1-1-1", "generate/-"])
async def test_names_of_nothing(quarantine: Command, name: str) -> None:
    status, _, told = await quarantine("drop", name)
    assert (status, told.startswith(f"{name}: no such entry")) == (1, True)


@pytest.mark.parametrize(
    "words",
    [
        "",
        "look",
        "show",
        "retry",
        "drop",
        "list generate/1-1",
        "list --all",
        "show --all",
        "drop --all generate/1-1",
        "list --body",
        "drop generate/1-1 --body",
    ],
)
async def test_what_cannot_be_asked(quarantine: Command, words: str) -> None:
    status, _, told = await quarantine(*words.split())
    assert (status, told.startswith("millrace quarantine: error: ")) == (2, True)


async def test_redis_does_not_do_its_part(quarantine: Command, redis: Redis, keys: Keys) -> None:
    await redis.set(keys.quarantine(ENCODE), b"not a stream")
    status, _, told = await quarantine("list")
    expected = f"millrace quarantine: Redis refuses: WRONGTYPE {keys.quarantine(ENCODE)} is a string and not a stream"
    assert (status, told.startswith(expected)) == (2, True)


async def test_only_keys_that_it_needs_keep_it_from_its_work(quarantine: Command, redis: Redis, keys: Keys) -> None:
    name = await put(redis, keys, GENERATE, GENERATED)
    for key in (keys.files(), keys.shards(), keys.quarantine(ENCODE)):
        await redis.set(key, "x")
    status, said, _ = await quarantine("show", name)
    assert (status, said.splitlines()[0]) == (0, name)
    status, _, told = await quarantine("retry", name)
    assert (status, f"{keys.shards()} is a string and not a hash" in told) == (2, True)
    assert await redis.xlen(keys.quarantine(GENERATE)) == 1
    assert (await quarantine("drop", name))[0] == 0
    assert await redis.xlen(keys.quarantine(GENERATE)) == 0
