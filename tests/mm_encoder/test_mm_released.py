"""Memory of media: it is given back when a request ends, and does not wait for the garbage collector."""

import asyncio

import pytest
from encoder_bench import Bench
from machine import PATIENCE_S
from media_files import picture, video_bytes, video_frames
from released import held, without_collector

from services.mm_encoder.media.patches import Patches
from services.mm_encoder.prepare import Prepared, Source
from services.mm_encoder.received import Received
from services.mm_encoder.running import RunningRequest
from shared.errors import RequestError
from shared.messages import Media, Request

KINDS = (Patches, Prepared, Source, Received, RunningRequest, RequestError, Request)
VIDEO = video_bytes(video_frames(4), "mp4", "mpeg4")
LINK = Media("image", "messages[0].content[0]", url="http://127.0.0.1:1/a.png")
REFUSED: dict[str, list[bytes | Media]] = {
    "text as image": [b"hello"],
    "truncated": [picture(300, 300)[:5000]],
    "a good one and a bad one": [picture(60, 60), picture(50, 50)[:90]],
    "two bad ones": [picture(60, 60)[:90], picture(50, 50)[:90]],
    "too large": [bytes(200_001)],
    "video as image": [VIDEO],
    "links": [LINK, LINK],
}


async def nothing_is_held() -> None:
    async with asyncio.timeout(PATIENCE_S):
        while held(*KINDS):  # noqa: ASYNC110 - no event tells of memory
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("name", REFUSED)
async def test_what_a_refused_request_holds_is_given_back(bench: Bench, name: str) -> None:
    async with bench.running(media_max_bytes=200_000):
        with without_collector():
            await bench.submit("bad", REFUSED[name])
            assert (await bench.refused()).status == 400
            await bench.settled()
            await nothing_is_held()


async def test_what_a_request_holds_is_given_back_when_it_was_handed_on(bench: Bench) -> None:
    async with bench.running():
        with without_collector():
            submitted = await bench.submit("good", [picture(60, 60), picture(100, 100)])
            await bench.told()
            generates = await bench.generates()
            await bench.settled()
            assert "Request" in held(*KINDS)
            del submitted, generates
            await nothing_is_held()
