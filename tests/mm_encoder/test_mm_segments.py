"""Embeddings in segments where this host's engines see them, and in Redis where one does not: the same bytes."""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from encoder_bench import Bench
from media_files import picture
from prometheus_client import CollectorRegistry

from services.mm_encoder.__main__ import _segments
from services.mm_encoder.store.segments import SegmentStore, Unwritten
from shared.bus.leases import Lease, Replica, live
from shared.segments import Reader, Segments

pytestmark = pytest.mark.system  # files are decoded in processes


class Host:
    """A host with an engine."""

    def __init__(self, bench: Bench, directory: Path) -> None:
        self._bench = bench
        self.segments = Segments(directory)
        self.reader = Reader(self.segments, "e")

    async def engine_lives(self, name: str) -> None:
        await Lease(self._bench.redis, self._bench.keys, "engine", name, 600_000).renew("ready")

    def read(self, key: str) -> bytes | None:
        found = self.segments.read(key)
        return None if found is None else bytes(found)


@pytest.fixture
def host(bench: Bench, tmp_path: Path) -> Iterator[Host]:
    made = Host(bench, tmp_path / "segments")
    yield made
    made.reader.close()


async def show(bench: Bench, request_id: str, count: int) -> str:
    """Ask about the picture; return its key."""
    await bench.submit(request_id, [picture(60, 60)])
    generate = (await bench.generates(count))[-1]
    await bench.settled()
    [span] = generate.spans
    return span.key


async def as_engines_read(bench: Bench, host: Host, key: str) -> bytes | None:
    return await in_redis(bench, key) or host.read(key)


async def in_redis(bench: Bench, key: str) -> bytes:
    blob = await bench.blobs.get("embeds", key)
    assert blob is not None
    return blob[0]


async def test_the_same_bytes_on_either_way(bench: Bench, host: Host) -> None:
    await host.engine_lives("e")
    async with bench.running():
        key = await show(bench, "a", 1)
    by_redis = await in_redis(bench, key)
    await bench.blobs.delete("embeds", [key])
    bench.registry = CollectorRegistry()  # of the next process
    async with bench.running(segments_dir=str(host.segments.directory)):
        assert await show(bench, "b", 2) == key
        assert (await in_redis(bench, key), host.read(key)) == (b"", by_redis)
        await show(bench, "c", 3)
        assert bench.passes() == 1


async def test_an_engine_elsewhere_has_them_from_redis(bench: Bench, host: Host) -> None:
    await host.engine_lives("e")
    async with bench.running(segments_dir=str(host.segments.directory)):
        key = await show(bench, "a", 1)
        assert await in_redis(bench, key) == b""
        await host.engine_lives("elsewhere")
        await show(bench, "b", 2)
        assert await in_redis(bench, key) == host.read(key)
        assert bench.passes() == 1
    bench.registry = CollectorRegistry()
    async with bench.running():
        await show(bench, "c", 3)
        assert bench.passes() == 0, "an encoder elsewhere finds them, too"


@pytest.mark.parametrize("lost", ["the segment", "the blob", "the engine's mark"])
async def test_what_is_lost_is_made_again(bench: Bench, host: Host, lost: str) -> None:
    await host.engine_lives("e")
    async with bench.running(segments_dir=str(host.segments.directory)):
        key = await show(bench, "a", 1)
        made = host.read(key)
        if lost == "the segment":
            host.segments.path(key).unlink()
        elif lost == "the blob":
            await bench.blobs.delete("embeds", [key])
        else:
            host.reader.close()
            host.segments.path(key).unlink()
        await show(bench, "b", 2)
        kept = await in_redis(bench, key) if lost == "the engine's mark" else host.read(key)
        assert kept == made
        assert bench.passes() == 2
    if lost == "the engine's mark":
        host.reader = Reader(host.segments, "e")


async def test_memory_is_prepared_beside_the_tower(bench: Bench, host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the second picture on, since engines see the first; not for the third, which counts as small."""
    places, write = list[Unwritten | None](), SegmentStore.write

    async def seen(store: SegmentStore, key: str, data: memoryview, unwritten: Unwritten | None) -> bool:
        places.append(unwritten)
        return await write(store, key, data, unwritten)

    monkeypatch.setattr(SegmentStore, "write", seen)
    monkeypatch.setattr("services.mm_encoder.store.cache.LARGE", 1)
    await host.engine_lives("e")
    async with bench.running(segments_dir=str(host.segments.directory)):
        key = await show(bench, "a", 1)
        made = host.read(key)
        for request_id, count in (("b", 2), ("c", 3)):
            host.segments.path(key).unlink()
            await show(bench, request_id, count)
            assert host.read(key) == made
            monkeypatch.setattr("services.mm_encoder.store.cache.LARGE", 1 << 20)
        assert bench.passes() == 3
    assert [place is not None for place in places] == [False, True, False]
    assert {path.name for path in host.segments.directory.iterdir() if path.is_file()} == {host.segments.path(key).name}


async def test_pictures_of_a_batch_ask_together_which_engines_live(
    bench: Bench, host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = 0

    async def counted(*told: Any) -> list[Replica]:
        nonlocal asked
        asked += 1
        return await live(*told)

    monkeypatch.setattr("services.mm_encoder.__main__.live", counted)
    store = _segments(bench.settings(segments_dir=str(host.segments.directory)), bench.redis, bench.keys)
    assert store is not None
    assert await asyncio.gather(*(store.reaches_all() for _ in range(8))) == [False] * 8
    assert asked == 1
    await host.engine_lives("e")
    assert await store.reaches_all()
    assert asked == 2


async def test_without_an_engine_they_wait_in_redis(bench: Bench, host: Host) -> None:
    async with bench.running(segments_dir=str(host.segments.directory)):
        assert await in_redis(bench, await show(bench, "a", 1)) != b""


async def test_an_encoder_without_the_directory_makes_them_again(bench: Bench, host: Host) -> None:
    await host.engine_lives("e")
    async with bench.running(segments_dir=str(host.segments.directory)):
        key = await show(bench, "a", 1)
    bench.registry = CollectorRegistry()
    async with bench.running():
        await show(bench, "b", 2)
        assert await in_redis(bench, key) == host.read(key)
        assert bench.passes() == 1


async def test_a_segment_that_does_not_fit_goes_through_redis(bench: Bench, host: Host) -> None:
    await host.engine_lives("e")
    async with bench.running(segments_dir=str(host.segments.directory), segments_bytes=1):
        key = await show(bench, "a", 1)
        assert await in_redis(bench, key) != b""
        assert host.read(key) is None


async def test_more_pictures_than_the_budget_holds_are_announced_once(bench: Bench, host: Host) -> None:
    """Several requests at once, each with more than fits: none takes away what engines have yet to map."""
    await host.engine_lives("e")
    async with bench.running():
        size = len(await in_redis(bench, await show(bench, "a", 1)))
    bench.registry = CollectorRegistry()
    async with bench.running(segments_dir=str(host.segments.directory), segments_bytes=size * 5 // 2):
        for request in range(3):
            await bench.submit(f"many {request}", [picture(60, 60, seed=4 * request + n) for n in range(1, 5)])
        generates = (await bench.generates(4))[1:]
        await bench.settled()
        keys = {span.key for generate in generates for span in generate.spans}
        assert len(keys) == 12
        assert {len(await as_engines_read(bench, host, key) or b"") for key in keys} == {size}
        assert sum(host.read(key) is not None for key in keys) == 2
        assert bench.count("millrace_mm_stage_seconds_count", stage="store") == 12
