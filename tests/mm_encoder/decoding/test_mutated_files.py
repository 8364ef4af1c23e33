"""Files with bytes changed, cut out or put in at random: each is decoded or is a 400, and the next one is decoded."""

import random
from collections import Counter

import pytest
from media_files import image_bytes, noise, picture, video_bytes, video_frames
from PIL import Image
from test_decoders import decode, running

from shared.errors import RequestError
from shared.messages import MediaKind

pytestmark = pytest.mark.system

FILES = 250
VIDEOS = [("mp4", "libx264"), ("webm", "libvpx"), ("avi", "mpeg4"), ("mpegts", "mpeg2video")]
MANY = (b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff")  # sizes and counts that are none


def originals() -> list[tuple[MediaKind, bytes]]:
    files: list[tuple[MediaKind, bytes]] = [
        ("image", picture(40, 50, kind)) for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
    ]
    files.append(("image", image_bytes(Image.fromarray(noise(40, 50)), "JPEG", progressive=True)))
    frames = video_frames(6, 48, 64)
    files += [("video", video_bytes(frames, container, codec, fps=25)) for container, codec in VIDEOS]
    return [*files, ("video", video_bytes(frames, "gif", "gif", pixels="rgb8"))]


def mutated(original: bytes, draw: random.Random) -> bytes:
    """Change a few places, most of them in the headers."""
    data = bytearray(original)
    for _ in range(draw.choice((1, 1, 2, 4, 16))):
        place = draw.randrange(min(len(data), draw.choice((64, 600, len(data)))))
        how = draw.randrange(4)
        if how == 0:
            data[place] = draw.randrange(256)
        elif how == 1:
            data[place : place + 4] = draw.choice(MANY)
        elif how == 2:
            del data[place + 1 : place + draw.randrange(64)]
        else:
            other = draw.randrange(len(data))
            data[place:place] = data[other : other + draw.randrange(64)]
    return bytes(data)


async def test_every_mutated_file_is_decoded_or_a_400() -> None:
    draw, outcomes, files = random.Random(14), Counter[str](), originals()
    async with running(image_s=5, video_s=5) as decoders:
        for _ in range(FILES):
            kind, original = draw.choice(files)
            try:
                await decode(decoders, mutated(original, draw), kind)
                outcomes["decoded"] += 1
            except RequestError as error:
                outcomes["refused" if error.failure.status == 400 else error.failure.message] += 1
        for kind, original in files:
            await decode(decoders, original, kind)
    assert set(outcomes) == {"decoded", "refused"}
    assert min(outcomes["decoded"], outcomes["refused"]) > FILES // 10, outcomes
