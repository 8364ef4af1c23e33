"""Prompts that go ahead of their embeddings: what the service leaves in Redis, whatever happens meanwhile."""

import asyncio
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from encoder_bench import GATEWAY, Bench, EngineStandIn
from loopback import running_site
from machine import PATIENCE_S
from media_files import picture
from torch import Tensor

from services.mm_encoder.decoding.decoders import Decoders
from services.mm_encoder.handler import CHANGED, INTERNAL, POISONED, SERVICE
from services.mm_encoder.media.patches import Patches
from services.mm_encoder.service import MmEncoder
from services.mm_encoder.vision.encoder import Encoder
from shared.bus.keys import ENCODE, GENERATE
from shared.bus.ownership import EntryOwnership
from shared.bus.streams import send
from shared.errors import Failure
from shared.messages import Accepted, Media, Offer, Offered

pytestmark = pytest.mark.system  # files are decoded in processes


class Tower:
    """The vision tower of the first replica that uses it, which runs only as often as it is allowed to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._passes = threading.Semaphore(0)
        self.failing = False
        first: list[Encoder] = []
        run = Encoder.encode

        def encode(encoder: Encoder, items: Sequence[Patches]) -> list[Tensor]:
            first.append(encoder)
            if encoder is first[0]:
                self._passes.acquire()
            if self.failing:
                raise RuntimeError("out of memory")
            return run(encoder, items)

        monkeypatch.setattr(Encoder, "encode", encode)

    def allow(self, passes: int = 1000) -> None:
        self._passes.release(passes)


@pytest.fixture
def tower(monkeypatch: pytest.MonkeyPatch) -> Iterator[Tower]:
    gated = Tower(monkeypatch)
    yield gated
    gated.allow()


async def entries(bench: Bench, stream: str) -> list[bytes]:
    return [entry_id for entry_id, _ in await bench.redis.xrange(bench.keys.stream(stream))]


async def state(bench: Bench) -> str | Failure:
    return await EntryOwnership(bench.redis, bench.keys, GENERATE, "engine", "e").embeds_state("a")


async def test_a_prompt_goes_ahead_while_its_pictures_are_encoded(bench: Bench, tower: Tower) -> None:
    async with bench.running():
        await bench.submit("a", [picture(60, 60), picture(90, 60)])
        [generate] = await bench.went_ahead()
        assert await bench.told() == Accepted("a", len(generate.prompt) // 4)
        assert [await bench.blobs.meta("embeds", span.key) for span in generate.spans] == [None, None]
        assert len(await entries(bench, ENCODE)) == 1
        assert await state(bench) == "coming"
        assert await bench.records.lost(["a"]) == set()
        tower.allow()
        assert await bench.generates() == [generate]
    for span in generate.spans:
        assert len((await bench.embeddings(span.key))[0]) == span.length
    assert await entries(bench, ENCODE) == []
    assert await bench.left() == bench.waits("a", uploads=2)
    assert bench.count("millrace_mm_requests_total", outcome="handed_on") == 1


async def test_a_prompt_whose_pictures_are_stored_waits_for_nothing(bench: Bench, tower: Tower) -> None:
    data = picture(60, 60)
    tower.allow(1)
    async with bench.running():
        await bench.submit("first", [data])
        await bench.generates()
        await bench.submit("a", [data])
        await bench.went_ahead(2)
        await bench.settled()
    assert not await bench.redis.hexists(bench.keys.request("a"), "ahead")


async def test_a_picture_is_encoded_while_another_is_decoded(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    decode, go_on = Decoders.patches, asyncio.Event()

    async def slow(decoders: Decoders, plan: object, data: bytes) -> Patches:
        if data == last:
            await go_on.wait()
        return await decode(decoders, plan, data)  # type: ignore[arg-type]

    monkeypatch.setattr(Decoders, "patches", slow)
    first, last = picture(60, 60), picture(90, 60)
    async with bench.running(max_model_len=500):  # too few for small images to be decoded with their headers
        await bench.submit("a", [first, last])
        async with asyncio.timeout(PATIENCE_S):
            while bench.passes() < 1:  # noqa: ASYNC110 - the event is in the tower's thread
                await asyncio.sleep(0.01)
        assert await entries(bench, GENERATE) == [], "the last one may still be refused"
        go_on.set()
        await bench.generates()
        await bench.settled()
    assert bench.passes() == 2


async def test_who_claims_the_entry_makes_the_embeddings(bench: Bench, tower: Tower) -> None:
    async with bench.running():
        await bench.submit("a", [picture(60, 60)])
        [generate] = await bench.went_ahead()
        [entry_id] = await entries(bench, ENCODE)
        await bench.redis.xclaim(bench.keys.stream(ENCODE), SERVICE, "dead", 0, [entry_id])
        tower.allow()
        assert await bench.generates() == [generate], "and hands nothing on again"
    [span] = generate.spans
    assert len((await bench.embeddings(span.key))[0]) == span.length


async def test_media_that_changed_meanwhile_end_the_request(bench: Bench, tower: Tower) -> None:
    pictures = [picture(60, 60), picture(60, 60, seed=1)]

    async def next_picture(path: str, writer: asyncio.StreamWriter) -> None:
        data = pictures.pop(0)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\nConnection: close\r\n\r\n" % len(data) + data)

    async with running_site() as site:
        site.handlers["/"] = next_picture
        async with bench.running(media_allow_networks=("127.0.0.0/8",)):
            await bench.submit("a", [Media("image", "p", url=site.url("/"))])
            await bench.went_ahead()
            [entry_id] = await entries(bench, ENCODE)
            await bench.redis.xclaim(bench.keys.stream(ENCODE), SERVICE, "dead", 0, [entry_id])
            tower.allow()
            await bench.settled()
    assert await state(bench) == CHANGED
    assert len(await entries(bench, GENERATE)) == 1, "an engine answers it"


async def test_a_tower_that_fails_ends_the_request_at_its_engine(bench: Bench, tower: Tower) -> None:
    tower.failing = True
    async with bench.running():
        await bench.submit("a", [picture(60, 60)])
        [generate] = await bench.went_ahead()
        assert await bench.told() == Accepted("a", len(generate.prompt) // 4)
        tower.allow()
        await bench.settled()
    assert await state(bench) == INTERNAL
    assert len(await entries(bench, GENERATE)) == 1
    assert await bench.redis.xlen(bench.keys.deltas(GATEWAY)) == 1, "nothing but Accepted"
    assert await bench.left() == bench.waits("a")


async def test_poison_ends_the_request_at_its_engine(bench: Bench, tower: Tower) -> None:
    async with bench.running(max_deliveries=2):
        await bench.submit("a", [picture(60, 60)])
        await bench.went_ahead()
        [entry_id] = await entries(bench, ENCODE)
        await bench.redis.xclaim(bench.keys.stream(ENCODE), SERVICE, "dead", 0, [entry_id])
        await bench.settled()
        tower.allow()
    assert await state(bench) == POISONED
    assert await bench.redis.xlen(bench.keys.quarantine(ENCODE)) == 1
    assert await bench.left() == bench.waits("a")


async def test_a_cancelled_request_is_left_to_its_engine(bench: Bench, tower: Tower) -> None:
    async with bench.running():
        await bench.submit("a", [picture(60, 60)])
        await bench.went_ahead()
        await bench.records.cancel(["a"])
        await bench.settled()
        tower.allow()
    assert len(await entries(bench, GENERATE)) == 1
    assert await bench.left() == bench.waits("a")
    assert bench.count("millrace_mm_requests_total", outcome="dropped") == 1


async def test_a_request_that_is_over_is_not_touched(bench: Bench, tower: Tower) -> None:
    """Its engine had all it needed in the prefix cache, say."""
    tower.failing = True
    async with bench.running():
        await bench.submit("a", [picture(60, 60)])
        await bench.went_ahead()
        await bench.redis.hset(bench.keys.request("a"), "over", "1")
        tower.allow()
        await bench.settled()
    assert not await bench.redis.hexists(bench.keys.request("a"), "failed")


async def test_a_prompt_that_was_sent_back_does_not_go_ahead_again(bench: Bench, tower: Tower) -> None:
    engine = EngineStandIn(bench)
    async with bench.running():
        await bench.submit("a", [picture(60, 60)])
        entry_id, first = await engine.take()
        assert await engine.ownership.send_back(entry_id, "a") == "done"
        async with asyncio.timeout(PATIENCE_S):
            while len(await entries(bench, ENCODE)) != 1:  # noqa: ASYNC110 - the first goes when the second is taken
                await asyncio.sleep(0.01)
        assert await entries(bench, GENERATE) == []
        tower.allow()
        _, second = await engine.take()
        await bench.settled()
    assert second == first
    assert bench.passes() == 1


async def stored(bench: Bench, keys: Sequence[str]) -> list[bool]:
    return [await bench.blobs.meta("embeds", key) is not None for key in keys]


async def ready(*services: MmEncoder) -> None:
    """Return when all of them read, and hear of offers."""
    async with asyncio.timeout(PATIENCE_S):
        while not all(service._consumer.idle for service in services):  # noqa: ASYNC110 - the event is in the service
            await asyncio.sleep(0.01)


async def test_an_idle_replica_makes_some_of_the_embeddings(bench: Bench, tower: Tower, directory: Path) -> None:
    """While the replica that has the request stands still with the locks of two passes, of four of them."""
    other = Bench(bench.redis, bench.keys, directory)
    pictures = [picture(60, 60, seed=seed) for seed in range(8)]
    few = {"tower_max_patches": 32, "lease_ms": 60_000}  # whose end would hand the other two on
    async with bench.running(name="mm-1", **few) as one, other.running(name="mm-2", **few) as two:
        try:
            await ready(one, two)
            await bench.submit("a", pictures)
            [generate] = await bench.went_ahead()
            keys = [span.key for span in generate.spans]
            async with asyncio.timeout(PATIENCE_S):
                while sum(await stored(bench, keys)) < 4:  # noqa: ASYNC110 - the event is in Redis
                    await asyncio.sleep(0.01)
            assert sum(await stored(bench, keys)) == 4
        finally:
            tower.allow()
        assert await bench.generates() == [generate]
    assert await stored(bench, keys) == [True] * 8
    assert not await bench.redis.exists(bench.keys.encode_locks())


async def test_help_with_what_cannot_be_had_comes_to_nothing(
    bench: Bench, tower: Tower, caplog: pytest.LogCaptureFixture
) -> None:
    """Nor with another picture than was offered."""
    caplog.set_level("INFO")
    tower.allow()
    gone = Offered("0" * 64, Media("image", "p", blob="gone"))
    changed = Offered("1" * 64, Media("image", "p", blob="changed"))
    await bench.blobs.put("media", "changed", picture(60, 60))
    async with bench.running() as service:
        await ready(service)
        await send(bench.redis, bench.keys.control(), Offer((changed, gone)))
        async with asyncio.timeout(PATIENCE_S):
            while "no help with an item" not in caplog.text:  # noqa: ASYNC110 - the event is in the service
                await asyncio.sleep(0.01)
        await bench.submit("a", [picture(90, 60)])
        await bench.generates()
        await bench.settled()
    assert await stored(bench, [gone.key, changed.key]) == [False, False]
    assert not await bench.redis.exists(bench.keys.encode_locks())
