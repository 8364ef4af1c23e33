"""Host side of the encoder: decoding beside bare Pillow and PyAV, and what a hit in the cache takes.

    python -m benchmarks.media_host [--rounds 12] [--output FILE.json]

Decoding: files as the service makes patches of them with `Decoders`, in two processes and eight files at once, against
as many processes that do with Pillow or PyAV what nobody can leave out: decode, and resize to the same size. In files
(videos: frames that are shown) a second of CPU time, over all processes. Both by turns; of each the round with the
least CPU time a file counts, since other load makes it more and never less; and milliseconds of one file alone, from
bytes to patches. A hit: milliseconds from the bytes in Redis, or behind a link on this machine, to the embeddings'
name, with the parts of the service that do it. Asserts nothing.
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
from cli.demo import write_demo
from cli.redis_server import RedisServer
from services.mm_encoder.__main__ import build
from services.mm_encoder.decoding.decoders import MALLOC, Decoders
from services.mm_encoder.decoding.small_images import is_small
from services.mm_encoder.media.patches import Patches
from services.mm_encoder.media.processor import ImagePlan, VideoPlan
from services.mm_encoder.prepare import Prepared, Preparer
from services.mm_encoder.settings import MmEncoderSettings
from shared.bus.blobs import EMBEDS, MEDIA, Blobs
from shared.bus.client import connect
from shared.bus.keys import Keys
from shared.messages import Encode, Media, MediaKind, Output, Request, Sampling

PROCESSES, AT_ONCE, HITS = 2, 8, 30
ROUND_S = 0.3  # of CPU time of each side
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


def bare_image(data: bytes, size: tuple[int, int]) -> None:
    """Decode and resize with Pillow alone."""
    opened = Image.open(io.BytesIO(data))
    opened.load()
    (opened if opened.mode == "RGB" else opened.convert("RGB")).resize(size, BICUBIC)


def bare_video(data: bytes, wanted: set[int], size: tuple[int, int]) -> None:
    """Decode and resize with PyAV and Pillow alone."""
    with av.open(io.BytesIO(data), "r") as container:
        for index, frame in enumerate(container.decode(video=0)):
            if index in wanted:
                frame.to_image().resize(size, BICUBIC)  # type: ignore[no-untyped-call]
            if index >= max(wanted):
                break


def cpu_s(bare: Callable[[], None], files: int) -> float:
    """Return the CPU seconds of one file of so many."""
    started = time.process_time()
    for _ in range(files):
        bare()
    return (time.process_time() - started) / files


def children() -> Iterator[int]:
    for path in Path("/proc/self/task").glob("*/children"):
        yield from map(int, path.read_text().split())


async def one(decoders: Decoders, media: Media, data: bytes) -> Patches:
    """Make patches of a file as `services/mm_encoder/prepare.py` does."""
    if is_small(media, data):
        plan, patches = await decoders.read_small(media, data)
    else:
        plan, patches = await decoders.plan(media, data), None
    return await decoders.patches(plan, data) if patches is None else patches


async def ours(decoders: Decoders, media: Media, data: bytes, files: int) -> float:
    """Return the CPU seconds of one file of so many."""
    used = _cpu()
    for _ in range(-(-files // AT_ONCE)):
        await asyncio.gather(*(one(decoders, media, data) for _ in range(AT_ONCE)))
    return (_cpu() - used) / (-(-files // AT_ONCE) * AT_ONCE)


async def alone(decoders: Decoders, media: Media, data: bytes) -> float:
    """Return the milliseconds of one file."""
    started = time.perf_counter()
    await one(decoders, media, data)
    return (time.perf_counter() - started) * 1000


def _cpu() -> float:
    """Return the CPU seconds of our process and its children, to the nanosecond."""
    threads = (path for pid in (os.getpid(), *children()) for path in Path(f"/proc/{pid}/task").glob("*/schedstat"))
    return sum(int(path.read_text().split()[0]) for path in threads) / 1e9


async def decoding(decoders: Decoders, rounds: int) -> list[dict[str, Any]]:
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
        bare: Callable[[], None]
        if isinstance(plan, VideoPlan):
            bare = partial(bare_video, data, set(plan.indices), plan.size[::-1])
        else:
            assert isinstance(plan, ImagePlan)
            grid = (await decoders.patches(plan, data)).grid
            bare = partial(bare_image, data, (grid[2] * 14, grid[1] * 14))
        shown = len(set(plan.indices)) if isinstance(plan, VideoPlan) else 1
        with ProcessPoolExecutor(PROCESSES, multiprocessing.get_context("spawn")) as pool:
            files = max(1, round(ROUND_S / pool.submit(cpu_s, bare, 3).result() / PROCESSES))
            await ours(decoders, media, data, 2 * AT_ONCE)  # processes start, and pages come
            theirs, cpu = [], []
            for _ in range(rounds):
                theirs += [job.result() for job in [pool.submit(cpu_s, bare, files) for _ in range(PROCESSES)]]
                cpu.append(await ours(decoders, media, data, PROCESSES * files))
        rates = {"bare": shown / min(theirs), "ours": shown / min(cpu), "share": min(theirs) / min(cpu)}
        rates["alone ms"] = statistics.median([await alone(decoders, media, data) for _ in range(5 * rounds)])
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
            item = await prepared(preparer, message)
            await blobs.put(EMBEDS, item.embedded.key, b"", _meta(item.embedded.grid, item.embedded.rows))
            times = []
            for _ in range(HITS):
                started = time.perf_counter()
                item = await prepared(preparer, message)
                times.append((time.perf_counter() - started) * 1000)
                assert item.patches is None
            found.append({"hit by": way, "p50 ms": statistics.median(times), "most ms": max(times)})
            await blobs.delete(EMBEDS, [item.embedded.key])
            print(", ".join(f"{key} {value}" for key, value in found[-1].items()), flush=True)
    return found


async def prepared(preparer: Preparer, message: Encode) -> Prepared:
    """Prepare the one item of a request, as the service does."""
    with preparer.receive(message) as received:
        [item], _ = await preparer.prepare(message, received, await preparer.fetch(message.media, received))
    return item


def _meta(grid: tuple[int, int, int], rows: int) -> bytes:
    return json.dumps({"grid": grid, "rows": rows, "hidden": 2560, "dtype": "bfloat16"}).encode()


async def measure(model: Path, url: str, rounds: int) -> dict[str, Any]:
    redis, keys = connect(url), Keys("bench")
    told = {"redis_url": url, "model": str(model), "namespace": "bench", "name": "mm", "max_model_len": 131_072}
    told |= {"preprocess_threads": PROCESSES, "media_allow_networks": ("127.0.0.0/8",)}
    settings = MmEncoderSettings(**told)  # type: ignore[arg-type]
    preparer = build(settings, redis, CollectorRegistry())._preparer
    try:
        decoded = await decoding(preparer._decoders, rounds)
        return {"decoding": decoded, "hits": await hits(preparer, Blobs(redis, keys, 3600, 1 << 30))}
    finally:
        await preparer.close()
        await redis.aclose()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ |= MALLOC  # for both sides
    with (
        tempfile.TemporaryDirectory() as directory,
        RedisServer(Path(directory) / "redis", dies_with_us=True) as server,
    ):
        model = Path(directory) / "demo"
        write_demo(model)
        result = asyncio.run(measure(model, server.url, args.rounds))
    if args.output:
        args.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
