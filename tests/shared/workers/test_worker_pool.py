"""Pool of worker processes: what kills one without the task's fault is not seen, and what nobody waits for ends."""

import asyncio
import os
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from machine import PATIENCE_S

from shared.workers import pool as module
from shared.workers import process
from shared.workers.pool import NoWorkerError, WorkerPool
from shared.workers.process import DiedError, TooSlowError

pytestmark = pytest.mark.system

# A worker that does what its messages say. "once" and a signal: it dies of that, unless it has done so before.
WORKER = """
import os, sys, time
from pathlib import Path
from shared.workers.link import Link
def do(words):
    match words:
        case ["die", number]:
            os.kill(os.getpid(), int(number))
        case ["once", number, path] if not Path(path).exists():
            Path(path).touch()
            os.kill(os.getpid(), int(number))
        case ["wait", begun, path]:
            Path(begun).touch()
            while not Path(path).exists():
                time.sleep(0.01)
    return str(os.getpid()).encode()
link = Link(int(sys.argv[1]))
while (received := link.receive()) is not None:
    link.send(do(received[0].decode().split()))
"""


@asynccontextmanager
async def running(directory: Path, setup: str = "", size: int = 1) -> AsyncIterator[WorkerPool]:
    (directory / "stand_in_worker.py").write_text(WORKER)
    pool = WorkerPool("stand_in_worker", setup.encode(), {**os.environ, "PYTHONPATH": str(directory)}, size)
    try:
        async with asyncio.timeout(PATIENCE_S):
            yield pool
    finally:
        await pool.close()


async def call(pool: WorkerPool, *words: object) -> bytes:
    return await pool.call(" ".join(map(str, words)).encode())


async def until(true: Callable[[], object]) -> None:
    while not true():  # noqa: ASYNC110  # a file has no event to wait for
        await asyncio.sleep(0.01)


async def test_a_task_whose_process_is_killed_is_done_by_another(tmp_path: Path) -> None:
    async with running(tmp_path) as pool:
        first = await call(pool)
        assert await call(pool, "once 9", tmp_path / "died") != first
        assert (tmp_path / "died").exists()


async def test_a_process_that_dies_while_it_starts_is_replaced(tmp_path: Path) -> None:
    async with running(tmp_path, f"once 9 {tmp_path / 'died'}") as pool:
        assert await pool.start_one() == await call(pool)
        assert (tmp_path / "died").exists()


async def test_a_task_that_crashes_two_processes_is_told_from_processes_that_are_killed(tmp_path: Path) -> None:
    async with running(tmp_path) as pool:
        with pytest.raises(DiedError, match="SIGSEGV"):
            await call(pool, "die 11")
        with pytest.raises(NoWorkerError, match="killed"):
            await call(pool, "die 9")
        await call(pool)


@pytest.mark.parametrize("missing", ["program", "module"])
async def test_processes_that_cannot_start_are_the_failure_of_a_task_and_not_of_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    async with running(tmp_path) as pool:
        if missing == "program":
            monkeypatch.setattr(process, "tethered", lambda command: [str(tmp_path / "absent"), *command])
        else:
            monkeypatch.setattr(pool, "_module", "absent_worker")
        why = "No such file" if missing == "program" else "exit status 1"
        with pytest.raises(NoWorkerError, match=why):
            await pool.start_one()
        with pytest.raises(NoWorkerError, match=why):
            await call(pool)
        monkeypatch.undo()
        await call(pool)


async def test_a_process_whose_task_nobody_waits_for_is_kept_if_that_ends_soon(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SPARE_S", PATIENCE_S)
    async with running(tmp_path) as pool:
        first, begun, end = await call(pool), tmp_path / "begun", tmp_path / "end"
        task = asyncio.create_task(call(pool, "wait", begun, end))
        await until(begun.exists)
        task.cancel()
        await asyncio.sleep(0)
        end.touch()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await call(pool) == first


async def test_a_process_whose_task_nobody_waits_for_ends_with_it_if_that_takes_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SPARE_S", 0.05)
    async with running(tmp_path) as pool:
        first, begun = await call(pool), tmp_path / "begun"
        task = asyncio.create_task(call(pool, "wait", begun, tmp_path / "never"))
        waiting = asyncio.create_task(call(pool))
        await until(begun.exists)
        task.cancel()
        assert await waiting != first
        with pytest.raises(asyncio.CancelledError):
            await task


async def test_a_task_may_take_long_as_long_as_it_computes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a busy machine, or at a low priority. One that computes nothing any more hangs."""
    looks, end = 0, tmp_path / "end"

    def computed_s(_pid: int) -> float:
        nonlocal looks
        looks += 1
        if looks == 5:
            end.touch()
        return float(looks)

    monkeypatch.setattr(process, "HANG_S", 0.01)
    async with running(tmp_path) as pool:
        monkeypatch.setattr(process, "computed_s", computed_s)
        await call(pool, "wait", tmp_path / "begun", end)
        assert looks >= 5
        monkeypatch.setattr(process, "computed_s", lambda _pid: 1.0)
        with pytest.raises(TooSlowError, match="computed nothing"):
            await call(pool, "wait", tmp_path / "begun", tmp_path / "never")


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells")
def test_the_time_that_a_process_has_computed_is_known() -> None:
    before = process.computed_s(os.getpid())
    while process.computed_s(os.getpid()) == before:
        pass
    assert process.computed_s(1 << 30) == 0


async def test_a_caller_that_leaves_before_its_turn_takes_no_process(tmp_path: Path) -> None:
    async with running(tmp_path) as pool:
        begun, end = tmp_path / "begun", tmp_path / "end"
        task = asyncio.create_task(call(pool, "wait", begun, end))
        await until(begun.exists)
        waiting = asyncio.create_task(call(pool, "die 9"))
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        end.touch()
        assert await task == await call(pool)
