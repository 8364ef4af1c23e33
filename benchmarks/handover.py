"""Cost of handing embeddings from mm_encoder to an engine: through Redis in memory, on disk, and as segments.

Segments also in a cache that is full: of 4,096 files, the oldest of which make room. They are sparse: what it takes to
free their pages is not in the figures.

    python -m benchmarks.handover [--runs 20] [--ways WAY ...] [--output FILE.json]

Both ends run here, one after the other, with the services' own classes; Redis is a process. For each size and way,
medians of `store` (mm_encoder has a tensor -> embeddings are announced) and `load` (announced -> the engine's thread
could read them) in milliseconds, the longest store, and CPU milliseconds of our process and of Redis for both
together. Asserts only that the bytes are the same.
"""

import argparse
import asyncio
import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from benchmarks.pipeline import cpu_seconds
from cli.redis_server import RedisServer
from services.engine.transport.embeds_loader import EmbedsLoader
from services.mm_encoder.store.cache import Embeds
from services.mm_encoder.store.segments import SegmentStore
from shared.bus.blobs import Blobs
from shared.bus.client import connect
from shared.bus.keys import GENERATE, Keys
from shared.bus.leases import Lease, live
from shared.bus.ownership import EntryOwnership
from shared.messages import MediaSpan
from shared.segments import Reader, Segments

HIDDEN = 2560  # bf16
SIZES = {"448 x 448": (1, 32, 32), "1080p": (1, 78, 138), "a video of 16,384 tokens": (64, 64, 32)}
WAYS = ("Redis in memory", "Redis on disk", "segments", "segments, full")
KEYS = Keys("bench")
KEPT = 4  # keys used in turns, which bounds the memory that this takes
BUDGET = 2 << 30  # of segments
FILES = 4096  # of a cache that is full


@contextmanager
def server(on_disk: bool) -> Iterator[RedisServer]:
    with tempfile.TemporaryDirectory() as directory, RedisServer(Path(directory), persistence=on_disk) as started:
        yield started


async def measure(url: str, pid: int, memory: Path | None, grid: tuple[int, int, int], runs: int) -> dict[str, float]:
    """Hand over embeddings of one size, `runs` times."""
    redis = connect(url)
    await Lease(redis, KEYS, "engine", "e", 3_600_000).renew("ready")

    async def engines() -> list[str]:
        return [replica.name for replica in await live(redis, KEYS, "engine")]

    blobs, segments = Blobs(redis, KEYS, 3600, 4 << 30), None if memory is None else Segments(memory)
    reader = None if segments is None else Reader(segments, "e")
    embeds = Embeds(blobs, None if memory is None else SegmentStore(memory, BUDGET, 3600, engines))
    loader = EmbedsLoader(blobs, EntryOwnership(redis, KEYS, GENERATE, "engine", "e"), HIDDEN, 1.0, segments)
    rows = torch.randn(grid[0] * grid[1] * grid[2] // (4 if grid[0] == 1 else 8), HIDDEN, dtype=torch.bfloat16)
    expected = rows.view(torch.uint8).numpy().tobytes()
    stored, loaded = [], []
    used = [time.process_time(), cpu_seconds(pid)]
    for run in range(runs):
        span = MediaSpan("image", f"key {run % KEPT}", 0, len(rows), grid)
        async with embeds.prepare(len(rows)) as place:
            if place is not None:
                await place  # as the tower takes longer
            started = time.perf_counter()
            await embeds.store(span.key, grid, rows, place)
            between = time.perf_counter()
        [found] = await loader.load("r", [span], wait=False)
        stored.append(between - started)
        loaded.append(time.perf_counter() - between)
        assert found is not None
        assert run or bytes(found.data) == expected
        del found
    used = [time.process_time() - used[0], cpu_seconds(pid) - used[1]]
    if reader is not None:
        reader.close()
    await redis.aclose()
    medians = {"store ms": statistics.median(stored), "load ms": statistics.median(loaded)}
    medians |= {"longest store ms": max(stored)}
    medians |= {"our CPU ms": used[0] / runs, "Redis CPU ms": used[1] / runs}
    return {"MB": len(expected) / 1e6} | {name: round(seconds * 1000, 1) for name, seconds in medians.items()}


def fill(memory: Path) -> None:
    """Fill a directory with segments that were used ten minutes ago."""
    segments, then = Segments(memory), time.time() - 600
    for number in range(FILES):
        path = segments.path(f"old {number}")
        with path.open("wb") as file:
            file.truncate(BUDGET // FILES)
        os.utime(path, (then, then))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    results = []
    for way in args.ways:
        with server(way != "Redis in memory") as started, tempfile.TemporaryDirectory(dir="/dev/shm") as memory:
            assert started.pid is not None
            place = Path(memory) if way.startswith("segments") else None
            for name, grid in SIZES.items():
                if way == "segments, full":
                    fill(Path(memory))
                found = asyncio.run(measure(started.url, started.pid, place, grid, args.runs))
                results.append({"way": way, "size": name, **found})
                print(", ".join(f"{key} {value}" for key, value in results[-1].items()), flush=True)
    if args.output:
        args.output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
