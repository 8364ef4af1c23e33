"""Host side of the encoder: decoding beside bare Pillow and PyAV, and what a hit in the cache takes.

    python -m benchmarks.media_host [--seconds 5] [--output FILE.json]

Decoding: files as `Decoders` makes patches of them, in two processes and four files at once, against as many processes
that do with Pillow or PyAV what nobody can leave out: decode, and resize to the same size. In files (videos: frames
that are shown) a second of CPU time, over all processes, which other load on the machine hardly changes; and
milliseconds of one file alone, from bytes to patches. A hit: milliseconds from the bytes in Redis, or behind a link on
this machine, to the embeddings' name, with the parts of the service that do it. Asserts nothing.
"""

import argparse
import asyncio
import io
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image
from prometheus_client import CollectorRegistry

from benchmarks.many_media import links, picture
from benchmarks.pipeline import cpu_seconds
from cli.demo import write_demo
from cli.redis_server import RedisServer
from services.mm_encoder.__main__ import build
from services.mm_encoder.decoding.decoders import Decoders
from services.mm_encoder.media.processor import ImagePlan, VideoPlan
from services.mm_encoder.prepare import Preparer
from services.mm_encoder.settings import MmEncoderSettings
from shared.bus.blobs import EMBEDS, MEDIA, Blobs
from shared.bus.client import connect
from shared.bus.keys import Keys
from shared.messages import Encode, Media, MediaKind, Output, Request, Sampling

PROCESSES, AT_ONCE, HITS = 2, 4, 30
BICUBIC = Image.Resampling.BICUBIC


def image(width: int, height: int, form: str) -> bytes:
    file = io.BytesIO()
    picture(0, width, height).save(file, form, quality=90)
    return file.getvalue()


def video(seconds: int, fps: int = 30) -> bytes:
    """Return 720p that moves, as phones and screens record it."""
    file, still = io.BytesIO(), np.asarray(picture(1, 1280, 720))
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=fps)
        stream.width, stream.height, stream.pix_fmt = 1280, 720, "yuv420p"
        stream.options = {"preset": "veryfast"}
        for frame in range(seconds * fps):
            moved = np.ascontiguousarray(np.roll(still, 3 * frame, axis=1))
            container.mux(stream.encode(av.VideoFrame.from_ndarray(moved, format="rgb24")))
        container.mux(stream.encode())
    return file.getvalue()


def bare_image(data: bytes, size: tuple[int, int]) -> float:
    """Return the CPU seconds of Pillow alone."""
    started = time.process_time()
    opened = Image.open(io.BytesIO(data))
    opened.load()
    (opened if opened.mode == "RGB" else opened.convert("RGB")).resize(size, BICUBIC)
    return time.process_time() - started


def bare_video(data: bytes, wanted: set[int], size: tuple[int, int]) -> float:
    """Return the CPU seconds of PyAV and Pillow alone."""
    started = time.process_time()
    with av.open(io.BytesIO(data), "r") as container:
        for index, frame in enumerate(container.decode(video=0)):
            if index in wanted:
                frame.to_image().resize(size, BICUBIC)  # type: ignore[no-untyped-call]
            if index >= max(wanted):
                break
    return time.process_time() - started


def children() -> Iterator[int]:
    for path in Path("/proc/self/task").glob("*/children"):
        yield from map(int, path.read_text().split())


async def ours(decoders: Decoders, media: Media, data: bytes, seconds: float) -> tuple[float, float]:
    """Return CPU seconds a file, and the seconds of one alone."""

    async def one() -> float:
        started = time.perf_counter()
        await decoders.patches(await decoders.plan(media, data), data)
        return time.perf_counter() - started

    await asyncio.gather(*(one() for _ in range(AT_ONCE)))  # processes start, and pages come
    alone = [await one() for _ in range(5)]
    used, files, until = _cpu(), 0, time.perf_counter() + seconds
    while time.perf_counter() < until:
        await asyncio.gather(*(one() for _ in range(AT_ONCE)))
        files += AT_ONCE
    return (_cpu() - used) / files, statistics.median(alone)


def _cpu() -> float:
    return time.process_time() + sum(cpu_seconds(pid) for pid in children())


async def decoding(decoders: Decoders, seconds: float) -> list[dict[str, Any]]:
    """Measure each kind of file."""
    kinds: list[tuple[str, MediaKind, Callable[[], bytes]]] = [
        ("JPEG 1920 x 1080", "image", partial(image, 1920, 1080, "JPEG")),
        ("JPEG 448 x 448", "image", partial(image, 448, 448, "JPEG")),
        ("PNG 1920 x 1080", "image", partial(image, 1920, 1080, "PNG")),
        ("8 s of 720p, 2 frames a second", "video", partial(video, 8)),
    ]
    found = []
    for name, kind, make in kinds:
        data = make()
        media = Media(kind, "p", blob="b")
        plan = await decoders.plan(media, data)
        bare: Callable[[], float]
        if isinstance(plan, VideoPlan):
            bare = partial(bare_video, data, set(plan.indices), plan.size[::-1])
        else:
            assert isinstance(plan, ImagePlan)
            grid = (await decoders.patches(plan, data)).grid
            bare = partial(bare_image, data, (grid[2] * 14, grid[1] * 14))
        shown = len(set(plan.indices)) if isinstance(plan, VideoPlan) else 1
        with ProcessPoolExecutor(PROCESSES, multiprocessing.get_context("spawn")) as pool:
            jobs = [pool.submit(bare) for _ in range(4 if kind == "video" else 24)]
            theirs = statistics.median(job.result() for job in jobs)
        cpu, alone = await ours(decoders, media, data, seconds)
        rates = {"bare": shown / theirs, "ours": shown / cpu, "share": theirs / cpu, "alone ms": alone * 1000}
        found.append({"file": name, "MB": len(data) / 1e6} | {key: round(value, 2) for key, value in rates.items()})
        print(", ".join(f"{key} {value}" for key, value in found[-1].items()), flush=True)
    return found


async def hits(preparer: Preparer, blobs: Blobs) -> list[dict[str, Any]]:
    """Measure how long it takes to find that a 1080p picture is known."""
    data = image(1920, 1080, "JPEG")
    found = []
    with links({"a.jpg": data}) as base:
        for way, media in (
            ("an upload", Media("image", "p", blob="seen")),
            ("a link", Media("image", "p", url=base + "a.jpg")),
        ):
            await blobs.put(MEDIA, "seen", data)
            request = Request("r", "g", 0, 0.0, Sampling(seed=1), Output(thinking=False))
            message = Encode(request, (b"", b""), (media,))
            [item], _ = await preparer.prepare(message)
            await blobs.put(EMBEDS, item.embedded.key, b"", _meta(item.embedded.grid, item.embedded.rows))
            times = []
            for _ in range(HITS):
                started = time.perf_counter()
                [item], _ = await preparer.prepare(message)
                times.append((time.perf_counter() - started) * 1000)
                assert item.patches is None
            found.append({"hit by": way, "p50 ms": statistics.median(times), "most ms": max(times)})
            await blobs.delete(EMBEDS, [item.embedded.key])
            print(", ".join(f"{key} {value}" for key, value in found[-1].items()), flush=True)
    return found


def _meta(grid: tuple[int, int, int], rows: int) -> bytes:
    return json.dumps({"grid": grid, "rows": rows, "hidden": 2560, "dtype": "bfloat16"}).encode()


async def measure(model: Path, url: str, seconds: float) -> dict[str, Any]:
    redis, keys = connect(url), Keys("bench")
    told = {"redis_url": url, "model": str(model), "namespace": "bench", "name": "mm", "max_model_len": 131_072}
    told |= {"preprocess_threads": PROCESSES, "media_allow_networks": ("127.0.0.0/8",)}
    settings = MmEncoderSettings(**told)  # type: ignore[arg-type]
    preparer = build(settings, redis, CollectorRegistry())._preparer
    try:
        decoded = await decoding(preparer._decoders, seconds)
        return {"decoding": decoded, "hits": await hits(preparer, Blobs(redis, keys, 3600, 1 << 30))}
    finally:
        await preparer.close()
        await redis.aclose()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with (
        tempfile.TemporaryDirectory() as directory,
        RedisServer(Path(directory) / "redis", dies_with_us=True) as server,
    ):
        model = Path(directory) / "demo"
        write_demo(model)
        result = asyncio.run(measure(model, server.url, args.seconds))
    if args.output:
        args.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
