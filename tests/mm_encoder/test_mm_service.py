"""The service on a real Redis, with a model that transformers has written and judges."""

import asyncio
import contextlib
import hashlib
import shutil
import struct
import tempfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from encoder_bench import GATEWAY, LIMITS, Bench, EngineStandIn, taken_by_a_dead_replica
from loopback import Site, running_site
from machine import PATIENCE_S
from media_bombs import scans_jpeg
from media_files import picture, video_bytes, video_frames
from oracle import Model
from prometheus_client import CollectorRegistry
from redis.asyncio import Redis
from redis.exceptions import ConnectionError, ResponseError
from torch import Tensor

from cli.redis_server import RedisServer
from services.mm_encoder import service as service_module
from services.mm_encoder.__main__ import build
from services.mm_encoder.decoding.decoders import Decoders
from services.mm_encoder.handler import SERVICE
from services.mm_encoder.media.image import open_image, resized, rgb_pixels
from services.mm_encoder.media.patches import CLIP_MEAN, CLIP_STD, Patches, patch_rows
from services.mm_encoder.media.processor_settings import ProcessorSettings
from services.mm_encoder.media.resize import smart_resize
from services.mm_encoder.vision.normalise import normalise
from shared.bus.client import connect
from shared.bus.keys import ENCODE, GENERATE, Keys
from shared.bus.ownership import EntryOwnership
from shared.bus.records import Records
from shared.errors import ConfigError, Failure
from shared.message_codec import from_entry
from shared.messages import Accepted, Content, Failed, Finish, Generate, Media, VideoOptions, unpack_ids
from shared.service import Life
from shared.workers import process


def judged_image(judge: Model, data: bytes) -> Tensor:
    image = rgb_pixels(open_image(data, 10**8))
    height, width = smart_resize(
        image.height, image.width, factor=28, min_pixels=3136, max_pixels=LIMITS.image_max_pixels
    )
    rows = torch.from_numpy(patch_rows(np.asarray(resized(image, height, width)), 14, 2))
    pixels = normalise(rows, torch.tensor(CLIP_MEAN), torch.tensor(CLIP_STD), torch.float32)
    with torch.no_grad():
        grid = torch.tensor([[1, height // 14, width // 14]])
        return judge.get_image_features(pixels, grid).pooler_output[0]


def huge_png() -> bytes:
    """The header of a 30,000 x 30,000 image, and a little of it."""
    head = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(("damaged", "begun"), [("request", False), ("request", True), ("type", False)])
async def test_a_damaged_record_ends_its_own_request(
    bench: Bench, redis: Redis, keys: Keys, damaged: str, begun: bool
) -> None:
    await bench.submit("bad", [picture(28, 28)])
    if damaged == "type":
        await redis.set(keys.request("bad"), "oops")
    else:
        await redis.hset(keys.request("bad"), "request", b"\xc1")
    if begun:
        await redis.hset(keys.request("bad"), "epoch", "1")
    async with bench.running():
        await bench.submit("good", [picture(28, 28)])
        await bench.generates()
        await bench.settled()
        told = {type(message): message for message in [await bench.told() for _ in range(1 if begun else 2)]}
    if begun:
        [(_, fields)] = await redis.xrange(keys.tokens(0))
        [run] = from_entry(fields).runs  # type: ignore[union-attr]
        assert run.finish.failure.code == "unreadable_state"
    else:
        failed = told[Failed]
        assert isinstance(failed, Failed)
        assert failed.failure.code == "unreadable_state"
        assert "request:bad" not in await bench.left()


@pytest.mark.parametrize("field", ["meta", "chunks"])
async def test_damaged_embeddings_are_made_again(bench: Bench, redis: Redis, keys: Keys, field: str) -> None:
    async with bench.running():
        await bench.submit("a", [picture(28, 28)])
        [first] = await bench.generates()
        await redis.hset(keys.blob("embeds", first.spans[0].key), field, b"?")
        await bench.submit("b", [picture(28, 28)])
        _, second = await bench.generates(2)
        found, _ = await bench.embeddings(second.spans[0].key)
    assert second.spans == first.spans
    assert len(found) == first.spans[0].length
    assert bench.passes() == 2


async def test_a_picture_becomes_a_prompt_and_embeddings(bench: Bench, judge: Model) -> None:
    data = picture(100, 150)
    async with bench.running():
        await bench.submit("a", [data], max_tokens=7)
        [generate] = await bench.generates()
    accepted = await bench.told()
    assert accepted == Accepted("a", 6 + 20)
    assert unpack_ids(generate.prompt) == [0, 1, 2, *[bench.patch_id] * 20, 10, 11, 12]
    assert generate.max_tokens == 7
    assert generate.request.id == "a"
    [span] = generate.spans
    assert (span.kind, span.offset, span.length, span.grid) == ("image", 3, 20, (1, 8, 10))
    found, meta = await bench.embeddings(span.key)
    assert meta["grid"] == [1, 8, 10]
    assert (found - judged_image(judge, data)).abs().max() <= 1e-4
    assert await bench.left() == bench.waits("a")
    assert await bench.redis.xlen(bench.keys.stream(ENCODE)) == 0


async def test_pictures_and_a_video_in_one_prompt(bench: Bench, judge: Model) -> None:
    await bench.blobs.put("media", "m-1", video_bytes(video_frames(9)))
    video = Media("video", "messages[0].content[1]", blob="m-1", video=VideoOptions(target_frames=4, min_frames=1))
    first, last = picture(100, 150), picture(60, 60, "JPEG")
    async with bench.running():
        await bench.submit("m", [first, video, last])
        [generate] = await bench.generates()
    kinds = [(span.kind, span.grid, span.length) for span in generate.spans]
    assert kinds == [("image", (1, 8, 10), 20), ("video", (4, 4, 6), 12), ("image", (1, 4, 4), 4)]
    assert [span.offset for span in generate.spans] == [3, 26, 41]
    assert len(unpack_ids(generate.prompt)) == 4 * 3 + 36
    assert generate.max_tokens == 2000 - 48
    for span, data in ((generate.spans[0], first), (generate.spans[2], last)):
        assert ((await bench.embeddings(span.key))[0] - judged_image(judge, data)).abs().max() <= 1e-4
    assert (await bench.embeddings(generate.spans[1].key))[0].shape == (12, 128)


async def test_the_same_picture_is_encoded_once(bench: Bench) -> None:
    data, other = picture(100, 150), picture(100, 150, seed=1)
    async with bench.running():
        for request_id in ("a", "b"):
            await bench.submit(request_id, [data])
            await bench.generates(1 if request_id == "a" else 2)
        assert bench.passes() == 1
        await bench.submit("c", [other])
        generates = await bench.generates(3)
    assert bench.passes() == 2
    keys = [generate.spans[0].key for generate in generates]
    assert keys[0] == keys[1] != keys[2]
    assert generates[0].spans == generates[1].spans
    assert bench.count("millrace_mm_cache_hits_total", kind="image") == 1
    assert bench.count("millrace_mm_cache_queries_total", kind="image") == 3


async def test_many_requests_at_once_with_few_pictures(bench: Bench, judge: Model) -> None:
    data = [picture(60 + 28 * i, 90, seed=i) for i in range(3)]
    async with bench.running(concurrency=4):
        for i in range(24):
            await bench.submit(f"r{i}", [data[i % 3], data[(i + 1) % 3]])
        generates = await bench.generates(24)
        await bench.settled()
    assert {generate.request.id for generate in generates} == {f"r{i}" for i in range(24)}
    assert len({span.key for generate in generates for span in generate.spans}) == 3
    assert bench.passes() <= 3
    for generate in generates:
        which = int(generate.request.id[1:])
        for span, shown in zip(generate.spans, (which % 3, (which + 1) % 3), strict=True):
            found, _ = await bench.embeddings(span.key)
            assert (found - judged_image(judge, data[shown])).abs().max() <= 1e-4
    assert await bench.left() == set().union(*(bench.waits(f"r{i}", 2) for i in range(24)))


async def test_other_settings_make_other_keys(bench: Bench) -> None:
    data = picture(100, 150)
    async with bench.running():
        await bench.submit("a", [data])
        await bench.generates(1)
    bench.registry = CollectorRegistry()
    async with bench.running(mm_processor_kwargs=ProcessorSettings(image_max_pixels=784 * 8)):
        await bench.submit("b", [data])
        one, two = await bench.generates(2)
    assert one.spans[0].key != two.spans[0].key
    assert two.spans[0].grid == (1, 4, 6)


def bad_media() -> dict[str, tuple[str, bytes, str]]:
    png, jpeg, video = picture(300, 300), picture(300, 300, "JPEG"), video_bytes(video_frames(4), "mp4", "mpeg4")
    fragments = video_bytes(video_frames(4), "mp4", "mpeg4", options={"movflags": "frag_keyframe+empty_moov"})
    return {
        "truncated JPEG": ("image", jpeg[: len(jpeg) // 2], "truncated"),
        "truncated PNG": ("image", png[: len(png) // 2], "truncated"),
        "30000 x 30000": ("image", huge_png(), "media_max_pixels"),
        "text as image": ("image", b"hello", "not an image"),
        "video as image": ("image", video, "not an image"),
        "truncated video": ("video", video[: len(video) // 2], "cannot? be read|that can be read"),
        "empty video": ("video", fragments[: fragments.index(b"moof") - 4], "no frames"),
        "text as video": ("video", b"hello", "that can be read"),
        "too many bytes": ("image", bytes(200_001), "media_max_bytes = 200000"),
    }


@pytest.mark.parametrize("name", bad_media())
async def test_bad_media_is_a_400_that_names_its_field_and_leaves_nothing(bench: Bench, name: str) -> None:
    kind, data, message = bad_media()[name]
    good = picture(60, 60)
    async with bench.running(media_max_bytes=200_000):
        await bench.blobs.put("media", "bad-x", data)
        bad = Media(kind, "messages[0].content[1].image_url", blob="bad-x")  # type: ignore[arg-type]
        await bench.submit("bad", [good, bad])
        failure = await bench.refused()
        await bench.settled()
        assert failure.status == 400
        assert failure.param == "messages[0].content[1].image_url"
        assert failure.message.startswith("`messages[0].content[1].image_url`: ")
        assert any(part in failure.message for part in message.split("|")), failure.message
        assert await bench.left() == set()
        assert await bench.redis.xlen(bench.keys.stream(GENERATE)) == 0
        await bench.submit("good", [good])
        assert await bench.told() == Accepted("good", 6 + 4)
        await bench.generates()
    assert bench.count("millrace_mm_requests_total", outcome="refused") == 1


@pytest.mark.parametrize(("room", "named"), [(2000, 0), (500, 1)])
async def test_of_two_bad_media_the_first_is_named(bench: Bench, room: int, named: int) -> None:
    """Sizes are checked before pixels, unless both are small and surely have room: then all is checked at once."""
    async with bench.running(max_model_len=room):
        await bench.submit("a", [picture(60, 60)[:90], b"hello"])
        assert (await bench.refused()).param == f"messages[0].content[{named}]"
        await bench.submit("b", [picture(60, 60)[:90], picture(50, 50)[:90]])
        assert (await bench.refused()).param == "messages[0].content[0]"
        await bench.settled()
    assert await bench.left() == set()


async def test_a_prompt_that_does_not_fit_is_refused_before_pixels_are_decoded(bench: Bench) -> None:
    async with bench.running(max_model_len=30):
        await bench.submit("a", [picture(100, 150), picture(100, 150, seed=1)])
        failure = await bench.refused()
        await bench.settled()
    assert (failure.status, failure.code) == (400, "context_length_exceeded")
    assert bench.count("millrace_mm_stage_seconds_count", stage="decode") == 0
    assert bench.passes() == 0
    assert await bench.left() == set()


async def test_all_media_of_a_request_have_a_limit_together(bench: Bench) -> None:
    data = [picture(60, 60, seed=i) for i in range(3)]
    async with bench.running(media_request_max_bytes=sum(map(len, data)) - 1):
        await bench.submit("a", data)
        failure = await bench.refused()
        await bench.settled()
    assert "media_request_max_bytes" in failure.message
    assert failure.param is not None


@pytest.mark.parametrize("content", [None, Content(bytes(32), 7)])
async def test_an_upload_that_is_gone_is_our_fault(bench: Bench, content: Content | None) -> None:
    async with bench.running():
        if content is not None:
            await bench.blobs.put("media", "a-0", b"others")
        await bench.submit("a", [Media("image", "messages[0]", blob="a-0", content=content)])
        failure = await bench.refused()
        await bench.settled()
    assert failure.status == 503
    assert failure.param == "messages[0]"


async def test_an_upload_whose_embeddings_are_stored_is_not_read(bench: Bench) -> None:
    data = picture(100, 150)
    content = Content(hashlib.sha256(data).digest(), len(data))
    async with bench.running(media_max_bytes=len(data)):
        await bench.submit("a", [data])
        await bench.generates()
        await bench.submit("b", [Media("image", "p", blob="never stored", content=content)])
        first, second = await bench.generates(2)
        await bench.blobs.put("media", "c", data)
        await bench.submit("c", [Media("image", "p", blob="c")])
        assert (await bench.generates(3))[2].spans == first.spans, "as where its gateway says nothing"
        told = [await bench.told() for _ in range(3)]
        await bench.submit("d", [Media("image", "p", blob="d", content=Content(content.digest, len(data) + 1))])
        assert "media_max_bytes" in (await bench.refused()).message
    assert second.spans == first.spans
    assert {type(message) for message in told} == {Accepted}
    assert bench.count("millrace_mm_cache_hits_total", kind="image") == 2


async def test_small_pictures_of_a_request_are_decoded_with_their_headers_if_all_have_room(bench: Bench) -> None:
    data = [picture(60 + 28 * i, 90, seed=i) for i in range(3)]
    async with bench.running():
        await bench.submit("a", [*data, data[0]])
        [generate] = await bench.generates()
    assert len({span.key for span in generate.spans}) == 3
    assert bench.count("millrace_mm_stage_seconds_count", stage="plan") == 0
    assert bench.count("millrace_mm_stage_seconds_count", stage="decode") == 3


async def test_media_from_the_web(bench: Bench, judge: Model) -> None:
    data = picture(100, 150)
    async with running_site() as site, bench.running(media_allow_networks=("127.0.0.0/8",)):
        await bench.submit("a", [Media("image", "p", url=site.serve("/picture.png", data))])
        [generate] = await bench.generates()
        await bench.told()
        await bench.submit("b", [Media("image", "q", url=site.url("/absent"))])
        failure = await bench.refused()
        await bench.settled()
    assert ((await bench.embeddings(generate.spans[0].key))[0] - judged_image(judge, data)).abs().max() <= 1e-4
    assert (failure.status, failure.param) == (400, "q")
    assert "status 404" in failure.message
    assert bench.count("millrace_mm_fetched_bytes_total") == len(data)


async def asked(site: Site, times: int) -> None:
    """Wait until the site was asked so often."""
    async with asyncio.timeout(PATIENCE_S):
        while len(site.heads) < times:  # noqa: ASYNC110 - whoever waits for an answer tells nobody
            await asyncio.sleep(0.01)


async def test_servers_that_do_not_answer_hold_up_no_other_pictures(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    answering, data = asyncio.Event(), picture(28, 28)

    async def answer(path: str, writer: asyncio.StreamWriter) -> None:
        await answering.wait()
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\nConnection: close\r\n\r\n" % len(data) + data)

    networks = ("127.0.0.0/8",)
    async with (
        running_site() as site,
        bench.running(concurrency=2, media_allow_networks=networks) as service,
    ):
        prepare, held = service._preparer.prepare, service._preparer._held
        most = working = 0
        held_back = asyncio.Event()

        async def counting(*args: Any) -> Any:
            nonlocal most, working
            working += 1
            most = max(most, working)
            await held_back.wait()
            try:
                return await prepare(*args)
            finally:
                working -= 1

        for name in "abcd":
            site.handlers[f"/{name}"] = answer
            await bench.submit(name, [picture(84, 84), Media("image", "p", url=site.url(f"/{name}"))])
        await bench.submit("light", [picture(56, 56)])
        [light] = await bench.generates()
        await asked(site, 4)
        assert held.sum == 0, "uploads are not read before their turn"
        monkeypatch.setattr(service._preparer, "prepare", counting)
        answering.set()
        async with asyncio.timeout(PATIENCE_S):
            while any(request.is_fetching for request in service._consumer.requests):  # noqa: ASYNC110 - all are here
                await asyncio.sleep(0)
        for _ in range(10):
            await asyncio.sleep(0)
        assert (working, held.sum) == (2, 4 * len(data))
        held_back.set()
        _, *others = await bench.generates(5)
        await bench.settled()
        assert (most, held.sum) == (2, 0)
    assert light.request.id == "light"
    assert {work.request.id for work in others} == set("abcd")


async def test_a_bounded_number_of_requests_waits_for_links(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.mm_encoder.handler.MOST_FETCHING", 1)
    answering, data = asyncio.Event(), picture(28, 28)

    async def answer(path: str, writer: asyncio.StreamWriter) -> None:
        await answering.wait()
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\nConnection: close\r\n\r\n" % len(data) + data)

    async with running_site() as site, bench.running(concurrency=1, media_allow_networks=("127.0.0.0/8",)) as service:
        for name in "abc":
            site.handlers[f"/{name}"] = answer
            await bench.submit(name, [Media("image", "p", url=site.url(f"/{name}"))])
        await asked(site, 2)
        assert service._consumer.free_slots + service._consumer._reserved == 0
        assert len(site.heads) == 2
        answering.set()
        await bench.generates(3)
        await bench.settled()


async def test_the_first_link_that_fails_ends_the_others(bench: Bench) -> None:
    never = asyncio.Event()

    async def silent(path: str, writer: asyncio.StreamWriter) -> None:
        await never.wait()

    limits = {"media_allow_networks": ("127.0.0.0/8",), "media_timeout_s": 10 * PATIENCE_S}
    async with running_site() as site, bench.running(**limits) as service:
        links = [site.url("/silent")] * 15 + [site.url("/gone")] + [site.url("/silent")] * 100
        site.handlers["/silent"] = silent
        await bench.submit("a", [Media("image", f"p{i}", url=url) for i, url in enumerate(links)])
        failure = await bench.refused()
        await bench.settled()
        assert service._preparer._held.sum == 0
        never.set()
    assert (failure.status, failure.param) == (400, "p15")
    assert "status 404" in failure.message


async def test_the_bytes_of_a_request_are_limited_while_they_come(bench: Bench) -> None:
    async def answer(path: str, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n")
        with contextlib.suppress(OSError):
            while True:
                writer.write(bytes(1000))
                await writer.drain()

    limits = {"media_request_max_bytes": 100_000, "media_max_bytes": 1_000_000}
    async with running_site() as site, bench.running(media_allow_networks=("127.0.0.0/8",), **limits):
        site.handlers["/endless"] = answer
        await bench.submit("a", [Media("image", "p", url=site.url("/endless"))])
        failure = await bench.refused()
        await bench.settled()
    assert failure.status == 400
    assert "media_request_max_bytes = 100000" in failure.message


@pytest.mark.parametrize("lost", [False, True])
async def test_a_link_that_has_not_changed_is_fetched_again_only_if_its_embeddings_are_lost(
    bench: Bench, lost: bool
) -> None:
    data = picture(100, 150)

    async def answer(path: str, writer: asyncio.StreamWriter) -> None:
        head = b'HTTP/1.1 200 OK\r\nETag: "1"\r\nContent-Length: %d\r\nConnection: close\r\n\r\n' % len(data)
        same = "If-None-Match" in site.heads[-1]
        writer.write(b"HTTP/1.1 304 Not Modified\r\nConnection: close\r\n\r\n" if same else head + data)

    async with running_site() as site, bench.running(media_allow_networks=("127.0.0.0/8",)):
        site.handlers["/a"] = answer
        await bench.submit("a", [Media("image", "p", url=site.url("/a"))])
        [generate] = await bench.generates()
        if lost:
            await bench.blobs.delete("embeds", [generate.spans[0].key])
        await bench.submit("b", [Media("image", "p", url=site.url("/a"))])
        _, again = await bench.generates(2)
        await bench.settled()
    assert again.spans == generate.spans
    assert len(site.heads) == 2 + lost
    assert bench.count("millrace_mm_fetched_bytes_total") == (1 + lost) * len(data)
    assert bench.passes() == 1 + lost


@pytest.mark.parametrize(
    "url", ["http://169.254.169.254/latest/meta-data/", "http://127.0.0.1:{port}/", "http://[::1]/"]
)
async def test_addresses_that_are_not_global_are_refused_by_default(bench: Bench, url: str) -> None:
    async with running_site() as site, bench.running():
        site.serve("/", picture(60, 60))
        await bench.submit("a", [Media("image", "messages[0].content[0]", url=url.format(port=site.port))])
        failure = await bench.refused()
        await bench.settled()
        assert site.heads == []
    assert (failure.status, failure.param) == (400, "messages[0].content[0]")
    assert "not allowed" in failure.message
    assert await bench.left() == set()


async def test_a_request_cancelled_before_it_is_taken_is_dropped(bench: Bench) -> None:
    await bench.submit("a", [picture(100, 150)])
    await bench.records.cancel(["a"])
    async with bench.running():
        await bench.settled()
    assert await bench.left() == set()
    assert await bench.redis.xlen(bench.keys.stream(GENERATE)) == 0
    assert await bench.redis.xlen(bench.keys.deltas(GATEWAY)) == 0
    assert bench.passes() == 0
    assert bench.count("millrace_mm_requests_total", outcome="dropped") == 1


async def test_a_request_without_a_record_is_dropped(bench: Bench) -> None:
    await bench.submit("a", [picture(100, 150)])
    await bench.records.delete(["a"])
    async with bench.running():
        await bench.settled()
    assert await bench.left() == set()
    assert await bench.redis.xlen(bench.keys.stream(GENERATE)) == 0


async def test_a_request_cancelled_in_hand_is_dropped_at_once(bench: Bench) -> None:
    """Its media never comes, and the time limit is far away."""
    asked, forever = asyncio.Event(), asyncio.Event()

    async def silent(path: str, writer: asyncio.StreamWriter) -> None:
        asked.set()
        await forever.wait()

    async with running_site() as site, bench.running(media_allow_networks=("127.0.0.0/8",), media_timeout_s=600.0):
        site.handlers["/"] = silent
        await bench.submit("a", [Media("image", "p", url=site.url("/")), picture(60, 60)])
        await asyncio.wait_for(asked.wait(), PATIENCE_S)
        await bench.records.cancel(["a"])
        await bench.settled()
        forever.set()
    assert await bench.left() == set()
    assert await bench.redis.xlen(bench.keys.deltas(GATEWAY)) == 0


async def test_an_entry_of_a_dead_replica_is_processed(bench: Bench) -> None:
    await bench.submit("a", [picture(100, 150)])
    await taken_by_a_dead_replica(bench)
    async with bench.running():
        [generate] = await bench.generates()
        await bench.settled()
    assert generate.request.id == "a"
    assert await bench.told() == Accepted("a", 26)
    assert await bench.left() == bench.waits("a")


async def test_an_entry_that_kills_replicas_is_answered(bench: Bench) -> None:
    await bench.submit("a", [picture(100, 150)])
    await taken_by_a_dead_replica(bench, times=3)
    async with bench.running(max_deliveries=3):
        failure = await bench.refused()
        await bench.settled()
    assert failure.status == 500
    assert await bench.left() == set()
    assert await bench.redis.xlen(bench.keys.quarantine(ENCODE)) == 1
    assert bench.passes() == 0


async def test_a_replica_that_has_lost_its_entry_refuses_nothing(bench: Bench) -> None:
    """It was paused for longer than its lease, and another has the entry now."""
    asked, go = asyncio.Event(), asyncio.Event()

    async def slow(path: str, writer: asyncio.StreamWriter) -> None:
        asked.set()
        await go.wait()

    # It does not look around while the test lasts.
    async with running_site() as site, bench.running(media_allow_networks=("127.0.0.0/8",), lease_ms=600_000):
        site.handlers["/"] = slow
        message = await bench.submit("a", [Media("image", "p", url=site.url("/"))])
        await asyncio.wait_for(asked.wait(), PATIENCE_S)
        [(entry_id, _)] = await bench.redis.xrange(bench.keys.stream(ENCODE))
        await bench.redis.xclaim(bench.keys.stream(ENCODE), SERVICE, "other", 0, [entry_id])
        go.set()
    assert bench.count("millrace_mm_requests_total", outcome="refused") == 1
    assert await bench.redis.xlen(bench.keys.deltas(GATEWAY)) == 0
    assert await bench.left() == {"request:a"}
    other = EntryOwnership(bench.redis, bench.keys, ENCODE, SERVICE, "other")
    assert await other.forward(entry_id.decode(), message, Generate(message.request, b"", 1)) == "done"


async def test_an_entry_that_redis_has_lost_is_let_go(bench: Bench) -> None:
    asked, forever = asyncio.Event(), asyncio.Event()

    async def silent(path: str, writer: asyncio.StreamWriter) -> None:
        asked.set()
        await forever.wait()

    async with running_site() as site, bench.running(media_allow_networks=("127.0.0.0/8",), concurrency=1) as service:
        site.handlers["/"] = silent
        await bench.submit("a", [Media("image", "p", url=site.url("/"))])
        await asyncio.wait_for(asked.wait(), PATIENCE_S)
        await bench.redis.flushall()
        await bench.submit("b", [picture(60, 60)])
        [generate] = await bench.generates()
        assert generate.request.id == "b"
        assert service.load()["running"] <= 1
        forever.set()
    assert await bench.left() == bench.waits("b")


async def test_two_replicas_encode_a_picture_once(bench: Bench, directory: Path) -> None:
    other = Bench(bench.redis, bench.keys, directory)
    data = picture(100, 150)
    one = {"concurrency": 1, "lease_ms": 60_000}  # whose end would hand the turn on
    async with bench.running(name="mm-1", **one), other.running(name="mm-2", **one):
        for i in range(4):
            await bench.submit(f"r{i}", [data])
        await bench.generates(4)
        await bench.settled()
    assert bench.passes() + other.passes() == 1
    assert not await bench.redis.exists(bench.keys.encode_locks())


async def test_a_request_past_its_deadline_is_answered(bench: Bench) -> None:
    await bench.submit("late", [picture(60, 60)], deadline=1.0)
    async with bench.running():
        failure = await bench.refused()
        await bench.settled()
    assert (failure.status, failure.code) == (504, "timeout")
    assert bench.passes() == 0
    assert await bench.left() == set()


async def test_who_dies_while_refusing_is_followed_by_the_same_refusal(bench: Bench) -> None:
    """The upload is gone by then, which would be another error."""
    await bench.submit("a", [b"hello"])
    await taken_by_a_dead_replica(bench)
    [(entry_id, _)] = await bench.redis.xrange(bench.keys.stream(ENCODE))
    dead = EntryOwnership(bench.redis, bench.keys, ENCODE, SERVICE, "dead-0")
    assert await dead.record_failure(entry_id.decode(), "a", Failure(400, "not an image"))
    await bench.blobs.delete("media", ["a-0"])
    async with bench.running():
        assert await bench.refused() == Failure(400, "not an image")
        await bench.settled()
    assert await bench.left() == set()


async def test_a_request_that_was_sent_back_is_encoded_again(bench: Bench) -> None:
    engine = EngineStandIn(bench)
    async with bench.running():
        await bench.submit("a", [picture(100, 150)])
        entry_id, first = await engine.take()
        await bench.settled()
        await bench.blobs.delete("embeds", [first.spans[0].key])
        assert await engine.ownership.send_back(entry_id, "a") == "done"
        _, second = await engine.take()
    assert second == first
    assert (await bench.embeddings(first.spans[0].key))[0].shape == (20, 128)
    assert bench.passes() == 2
    assert await engine.last_words() == []
    assert await bench.left() == bench.waits("a")


@pytest.mark.parametrize("why", ["upload gone", "cancelled", "poison"])
async def test_a_request_that_an_engine_had_ends_in_the_tokens_stream(bench: Bench, why: str) -> None:
    engine = EngineStandIn(bench)
    async with bench.running():
        await bench.submit("a", [picture(100, 150)])
        entry_id, first = await engine.take()
        await bench.settled()
    assert await bench.told() == Accepted("a", 26)
    await bench.blobs.delete("embeds", [first.spans[0].key])
    assert await engine.ownership.send_back(entry_id, "a") == "done"
    if why == "upload gone":
        await bench.blobs.delete("media", ["a-0"])
    elif why == "cancelled":
        await bench.records.cancel(["a"])
    else:
        await taken_by_a_dead_replica(bench, times=3)
    bench.registry = CollectorRegistry()
    async with bench.running(max_deliveries=3):
        await bench.settled()
    [run] = await engine.last_words()
    assert (run.request_id, run.epoch, run.tokens) == ("a", 1, ())
    assert run.finish is not None
    if why == "cancelled":
        assert run.finish == Finish("cancelled")
    else:
        assert run.finish.failure is not None
        assert run.finish.failure.status == (503 if why == "upload gone" else 500)
    assert await bench.redis.xlen(bench.keys.quarantine(ENCODE)) == (why == "poison")
    assert await bench.redis.xlen(bench.keys.deltas(GATEWAY)) == 1, "nothing but Accepted"
    assert await bench.left() == {"request:a"}, "postproc ends it"


@pytest.mark.system
async def test_decoders_that_cannot_start_are_the_failure_of_their_requests(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "tethered", lambda command: ["/absent", *command])
    async with bench.running():
        await bench.submit("a", [picture(60, 60)])
        failure = await bench.refused()
        assert (failure.status, failure.code) == (503, "overloaded")
        monkeypatch.undo()
        await bench.submit("b", [picture(60, 60)])
        [generate] = await bench.generates()
        assert generate.request.id == "b"


@pytest.mark.system
async def test_what_redis_forgot_does_not_stop_the_service(directory: Path, judge: Model, tmp_path: Path) -> None:
    """Redis dies in the middle, and comes back with nothing."""
    with RedisServer(Path(tempfile.mkdtemp(prefix="millrace-")), namespace="test") as server:
        redis = connect(server.url)
        bench = Bench(redis, Keys("test"), directory)
        async with bench.running():
            await bench.submit("a", [picture(60, 60)])
            await bench.generates()
            server.kill()
            await asyncio.to_thread(server.start)
            await bench.submit("b", [picture(60, 60)])
            [generate] = await bench.generates()
            assert generate.request.id == "b"
        await redis.aclose()
    shutil.rmtree(server.directory)


async def test_an_error_of_redis_that_we_have_made_ends_the_process_and_keeps_the_entry(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def mistaken(records: Records, ids: list[str]) -> None:
        raise ResponseError("ERR wrong number of arguments")

    monkeypatch.setattr(Records, "get", mistaken)
    settings = bench.settings()
    life = Life(SERVICE, build(settings, bench.redis, bench.registry), settings, bench.redis)
    await bench.submit("a", [picture(60, 60)])
    async with asyncio.timeout(PATIENCE_S):
        assert await life.run() == 1
    assert await bench.redis.xlen(bench.keys.stream(ENCODE)) == 1
    assert await bench.redis.xlen(bench.keys.deltas(GATEWAY)) == 0


async def test_a_bug_costs_one_request(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is raised that nobody foresaw: a 500 without its text, and the service goes on."""
    good, bad = picture(60, 60), picture(61, 61)

    async def planted(decoders: Decoders, media: Media, data: bytes) -> Any:
        if data == bad:
            raise ZeroDivisionError("secret detail")
        return await read_small(decoders, media, data)

    read_small = Decoders.read_small
    monkeypatch.setattr(Decoders, "read_small", planted)
    async with bench.running():
        await bench.submit("bad", [good, bad])
        failure = await bench.refused()
        await bench.submit("good", [good])
        [generate] = await bench.generates()
        await bench.settled()
    assert failure.status == 500
    assert "secret" not in failure.message
    assert generate.request.id == "good"
    assert await bench.left() == bench.waits("good")
    assert bench.count("millrace_mm_requests_total", outcome="failed") == 1


async def test_a_long_decode_does_not_outlast_the_drain(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another replica has it then: its entry stays."""
    begun, patches = asyncio.Event(), Decoders.patches

    async def seen(decoders: Decoders, *args: Any) -> Patches:
        begun.set()
        return await patches(decoders, *args)

    monkeypatch.setattr(Decoders, "patches", seen)
    async with bench.running(drain_s=0.1):
        await bench.submit("long", [scans_jpeg(6000, 80)])
        await begun.wait()
    assert await bench.redis.xlen(bench.keys.stream(ENCODE)) == 1


async def test_what_is_in_hand_is_finished_when_told_to_stop(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, go = asyncio.Event(), asyncio.Event()
    read_small = Decoders.read_small

    async def slow(self: Decoders, *given: Any) -> Any:
        asked.set()
        await go.wait()
        return await read_small(self, *given)

    monkeypatch.setattr(Decoders, "read_small", slow)
    settings = bench.settings(concurrency=1)
    service = build(settings, bench.redis, bench.registry)
    life = Life(SERVICE, service, settings, bench.redis)
    task = asyncio.create_task(life.run())
    await bench.submit("a", [picture(60, 60)])
    await asyncio.wait_for(asked.wait(), PATIENCE_S)
    await bench.submit("b", [picture(60, 60)])
    life.stop.set()
    await asyncio.sleep(0)
    go.set()
    assert await task == 0
    [generate] = await bench.generates()
    assert generate.request.id == "a"
    assert await bench.redis.xlen(bench.keys.stream(ENCODE)) == 1, "the second waits for another replica"
    assert await bench.redis.xinfo_consumers(bench.keys.stream(ENCODE), "mm_encoder") == []


async def test_a_redis_for_blobs_alone_is_asked_whether_it_evicts(
    bench: Bench, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: asyncio.Future[Redis] = asyncio.get_running_loop().create_future()
    failures = [ConnectionError("away")]

    async def look(redis: Redis) -> None:
        if failures:
            raise failures.pop()
        asked.set_result(redis)

    monkeypatch.setattr(service_module, "check_eviction_of_blobs", look)
    async with bench.running(blob_redis_url=redis_url):
        client = await asyncio.wait_for(asked, PATIENCE_S)
        assert client is not bench.redis
        assert await client.ping()


async def test_a_device_that_is_not_there_is_named(bench: Bench) -> None:
    with pytest.raises(ConfigError, match="MILLRACE_DEVICE: 'nonsense'"):
        build(bench.settings(device="nonsense"), bench.redis, bench.registry)


async def test_torch_computes_with_the_threads_that_are_set(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    set_to: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", set_to.append)
    service = build(bench.settings(torch_threads=7), bench.redis, bench.registry)
    assert set_to == [7]
    await service.close()
