"""The queue before the tower, and one flight at a time."""

import asyncio
import threading
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import numpy as np
import pytest
import torch
from machine import PATIENCE_S
from prometheus_client import CollectorRegistry
from torch import Tensor

from services.mm_encoder.media.patches import Patches
from services.mm_encoder.metrics import Metrics
from services.mm_encoder.store.cache import SingleFlight
from services.mm_encoder.vision.batcher import ENOUGH, PATIENCE, Batcher


def patches(rows: int) -> Patches:
    return Patches(np.zeros((rows, 588), np.uint8), (1, 2, rows // 2))


class Recording:
    """Encodes to the number of rows; the first batch waits for `go`."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.begun = threading.Event()
        self.go = threading.Event()

    def encode(self, items: Sequence[Patches]) -> list[Tensor]:
        self.batches.append([len(item.rows) for item in items])
        self.begun.set()
        assert self.go.wait(PATIENCE_S)
        if any(len(item.rows) == 666 for item in items):
            raise RuntimeError("planted")
        return [torch.tensor([len(item.rows)]) for item in items]


@asynccontextmanager
async def running(encoder: Recording, max_patches: int) -> AsyncIterator[Batcher]:
    batcher = Batcher(encoder, max_patches, Metrics(CollectorRegistry()))
    batcher.start()
    yield batcher
    encoder.go.set()
    await batcher.close()


async def begun(encoder: Recording) -> None:
    assert await asyncio.to_thread(encoder.begun.wait, PATIENCE_S)


async def test_what_waits_is_encoded_together_up_to_the_limit() -> None:
    encoder = Recording()
    async with running(encoder, 100) as batcher:
        first = asyncio.create_task(batcher.encode(patches(4)))
        await begun(encoder)
        rest = [asyncio.create_task(batcher.encode(patches(rows))) for rows in (60, 40, 2, 500, 8)]
        await asyncio.sleep(0)
        encoder.go.set()
        assert [int(await task) for task in (first, *rest)] == [4, 60, 40, 2, 500, 8]
    assert encoder.batches == [[4], [60, 40], [2], [500], [8]]


async def test_no_batch_is_larger_than_makes_it_faster() -> None:
    encoder = Recording()
    async with running(encoder, 100 * ENOUGH) as batcher:
        first = asyncio.create_task(batcher.encode(patches(4)))
        await begun(encoder)
        rest = [asyncio.create_task(batcher.encode(patches(rows))) for rows in (10, ENOUGH - 10, 2, ENOUGH + 2)]
        await asyncio.sleep(0)
        encoder.go.set()
        await asyncio.gather(first, *rest)
    assert encoder.batches == [[4], [10, ENOUGH - 10], [2], [ENOUGH + 2]]


async def test_who_lacks_least_comes_first_and_nobody_waits_for_ever() -> None:
    encoder = Recording()
    async with running(encoder, 10) as batcher:
        first = asyncio.create_task(batcher.encode(patches(2)))
        await begun(encoder)
        many = [asyncio.create_task(batcher.encode(patches(8), lambda: 50)) for _ in range(2)]
        few = [asyncio.create_task(batcher.encode(patches(6), lambda: 1)) for _ in range(PATIENCE + 3)]
        await asyncio.sleep(0)
        encoder.go.set()
        await asyncio.gather(first, *many, *few)
    assert encoder.batches == [[2], *[[6]] * PATIENCE, [8], [8], *[[6]] * 3]


async def test_an_error_reaches_its_batch_and_no_other() -> None:
    encoder = Recording()
    async with running(encoder, 1000) as batcher:
        first = asyncio.create_task(batcher.encode(patches(4)))
        await begun(encoder)
        doomed = [asyncio.create_task(batcher.encode(patches(rows))) for rows in (8, 666)]
        later = asyncio.create_task(batcher.encode(patches(900)))
        await asyncio.sleep(0)
        encoder.go.set()
        assert int(await first) == 4
        for task in doomed:
            with pytest.raises(RuntimeError, match="planted"):
                await task
        assert int(await later) == 900


async def test_what_nobody_waits_for_any_more_is_not_encoded() -> None:
    encoder = Recording()
    async with running(encoder, 1000) as batcher:
        first = asyncio.create_task(batcher.encode(patches(4)))
        await begun(encoder)
        given_up, kept = (asyncio.create_task(batcher.encode(patches(rows))) for rows in (8, 12))
        await asyncio.sleep(0)
        given_up.cancel()
        await asyncio.wait([given_up])
        encoder.go.set()
        assert int(await kept) == 12
        assert int(await first) == 4
    assert encoder.batches == [[4], [12]]


async def test_a_key_is_computed_once_at_a_time() -> None:
    flights: SingleFlight[int] = SingleFlight()
    starts: list[int] = []
    go = asyncio.Event()

    async def compute() -> int:
        starts.append(1)
        await go.wait()
        return len(starts)

    waiting = [asyncio.create_task(flights.join("a", compute)) for _ in range(5)]
    other = asyncio.create_task(flights.join("b", compute))
    await asyncio.sleep(0)
    waiting[0].cancel()
    await asyncio.wait([waiting[0]])
    go.set()
    assert [await task for task in waiting[1:]] == [2] * 4
    assert await other == 2
    assert len(starts) == 2
    assert await flights.join("a", compute) == 3, "a flight that has landed is not joined"


async def test_all_who_wait_hear_of_a_failure_and_the_next_starts_anew() -> None:
    flights: SingleFlight[int] = SingleFlight()

    async def fail() -> int:
        raise RuntimeError("planted")

    results = await asyncio.gather(*(flights.join("a", fail) for _ in range(3)), return_exceptions=True)
    assert [str(result) for result in results] == ["planted"] * 3

    async def work() -> int:
        return 1

    assert await flights.join("a", work) == 1
