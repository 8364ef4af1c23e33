"""Decoder processes: they make what the processor makes, and whatever a file does to one is that file's refusal."""

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import numpy as np
import pytest
from machine import PATIENCE_S
from media_bombs import canvas_gif, scans_jpeg, wide_png
from media_files import image_bytes, patches_of, picture, video_bytes, video_frames
from PIL import Image
from prometheus_client import CollectorRegistry

from services.mm_encoder.decoding import decoders as pool
from services.mm_encoder.decoding import small_images
from services.mm_encoder.decoding.decoders import Decoders, TimeLimit
from services.mm_encoder.decoding.messages import Setup, SmallTask, from_encoder
from services.mm_encoder.media import timestamps
from services.mm_encoder.media.patches import Patches
from services.mm_encoder.media.processor import Processor
from services.mm_encoder.media.processor_settings import ProcessorSettings
from services.mm_encoder.media.video import VideoLimits
from services.mm_encoder.metrics import Metrics
from shared.errors import Failure, RequestError
from shared.messages import Media, MediaKind
from shared.model.config import VisionConfig
from shared.workers import process
from shared.workers.pool import WorkerPool

pytestmark = pytest.mark.system

VISION = VisionConfig(2, 32, 2, 128, 14, 3, 2, 2, 1e-6, 1e4)
LIMITS = VideoLimits(64_000_000, 3600, 216_000)
SETTINGS = ProcessorSettings(image_max_pixels=784 * 100)
FONT = timestamps.font_file(Path("absent"))[0]
LONG = canvas_gif(2500, 2000)  # more pixels than any limit on time of these tests allows

# Runs at the start of every Python program that finds it: gives the processes a file that harms them.
PLANTED = """
import os, signal, time
import PIL.Image
def harmful(file, formats):
    what = file.getvalue()
    if what == b"crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if what == b"spin":
        while True:
            pass
    if what == b"hang":
        time.sleep(3600)
    if what == b"raise":
        raise ZeroDivisionError("secret detail")
    return real(file, formats=formats)
real, PIL.Image.open = PIL.Image.open, harmful
"""


@asynccontextmanager
async def running(
    image_s: int = 20,
    video_s: int = 120,
    memory: int = 2 << 30,
    processes: int = 1,
    planted: Path | None = None,
) -> AsyncIterator[Decoders]:
    environ = dict(os.environ)
    if planted is not None:
        (planted / "sitecustomize.py").write_text(PLANTED)
        environ["PYTHONPATH"] = str(planted)
    before = children()  # of other tests: their Redis, say
    decoders = Decoders(
        Setup(SETTINGS, LIMITS, VISION, FONT, True, memory),
        environ,
        processes=processes,
        limits={"image": TimeLimit("image_decode_s", image_s), "video": TimeLimit("video_decode_s", video_s)},
        metrics=Metrics(CollectorRegistry()),
    )
    try:
        async with asyncio.timeout(PATIENCE_S):
            yield decoders
    finally:
        await decoders.close()
    assert children() - before == set()


def children() -> set[int]:
    """Return our child processes, zombies too."""
    if sys.platform != "linux":
        return set()
    found: set[int] = set()
    for thread in Path("/proc/self/task").iterdir():
        with suppress(FileNotFoundError):  # it has ended since
            found.update(map(int, (thread / "children").read_text().split()))
    return found


async def decode(decoders: Decoders, data: bytes, kind: MediaKind = "image") -> Patches:
    return await decoders.patches(await decoders.plan(Media(kind, "p"), data), data)


async def refusal(decoders: Decoders, data: bytes, kind: MediaKind = "image") -> Failure:
    with pytest.raises(RequestError) as caught:
        await decode(decoders, data, kind)
    return caught.value.failure


@pytest.mark.parametrize("kind", ["image", "video"])
async def test_a_process_makes_what_the_processor_makes(kind: MediaKind) -> None:
    data = picture(120, 90) if kind == "image" else video_bytes(video_frames(5))
    processor = Processor(SETTINGS, LIMITS, VISION, FONT)
    expected = patches_of(processor, processor.plan(Media(kind, "p"), data), data)
    async with running() as decoders:
        made = await decode(decoders, data, kind)
    assert made.grid == expected.grid
    assert np.array_equal(made.rows, expected.rows)
    assert made.rows.flags.writeable, "torch warns otherwise"


async def test_pictures_that_live_at_once_have_memory_of_their_own() -> None:
    files = [picture(120, 90, seed=seed) for seed in range(6)]
    processor = Processor(SETTINGS, LIMITS, VISION, FONT)
    expected = [patches_of(processor, processor.plan(Media("image", "p"), data), data).rows for data in files]
    async with running() as decoders:
        first = [await decode(decoders, data) for data in files[:3]]
        del first[1]
        others = await asyncio.gather(*(decode(decoders, data) for data in files[3:]))
    made = [first[0], first[1], *others]
    for patches, rows in zip(made, [expected[0], *expected[2:]], strict=True):
        assert np.array_equal(patches.rows, rows)


async def test_a_crash_is_the_refusal_of_the_file_that_causes_it(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The log has where it was, although what is printed during a task is not in it."""
    async with running(planted=tmp_path) as decoders:
        failure = await refusal(decoders, b"crash")
        assert (failure.status, failure.code) == (400, "invalid_media")
        assert "crash" in failure.message
        await decode(decoders, picture(30, 30))
    printed = capfd.readouterr().err
    assert "Fatal Python error: Segmentation fault" in printed
    assert "in open_image" in printed


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
async def test_a_file_whose_process_is_killed_is_decoded_in_another() -> None:
    async with running() as decoders:
        before = children()
        await decoders.start()
        [pid] = children() - before
        os.kill(pid, signal.SIGKILL)
        await decode(decoders, picture(30, 30))
        assert pid not in children()


async def test_processes_that_cannot_start_are_the_failure_of_a_file_and_not_of_the_next(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with running() as decoders:
        monkeypatch.setattr(process, "tethered", lambda command: ["/absent", *command])
        await decoders.start()
        failure = await refusal(decoders, picture(30, 30))
        assert (failure.status, failure.code) == (503, "overloaded")
        monkeypatch.undo()
        await decode(decoders, picture(30, 30))


async def test_an_unforeseen_error_is_a_refusal_that_does_not_tell_it(tmp_path: Path) -> None:
    async with running(planted=tmp_path) as decoders:
        failure = await refusal(decoders, b"raise")
    assert failure.status == 400
    assert "secret" not in failure.message


async def test_what_libraries_print_about_a_file_is_not_in_the_log(capfd: pytest.CaptureFixture[str]) -> None:
    """libtiff has a line for every line of a fax that it cannot read, and Pillow warns of what a TIFF lacks."""
    fax = bytearray(image_bytes(Image.new("1", (2000, 500)), "TIFF", compression="group3"))
    fax[100:-100] = bytes(range(1, 201)) * ((len(fax) - 200) // 200) + bytes((len(fax) - 200) % 200)
    async with running() as decoders:
        with suppress(RequestError):
            await decode(decoders, bytes(fax))
        await decode(decoders, picture(30, 30))
    assert capfd.readouterr().err == ""


async def test_a_file_that_computes_for_too_long_is_refused_by_the_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool, "SLICE_S", 0)
    async with running(image_s=1, planted=tmp_path) as decoders:
        failure = await refusal(decoders, b"spin")
        assert failure.code == "media_limit_exceeded"
        assert "image_decode_s = 1" in failure.message
        await decode(decoders, picture(30, 30))


async def test_a_file_that_waits_for_ever_is_refused_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "HANG_S", 0.1)
    async with running(planted=tmp_path) as decoders:
        assert "image_decode_s = 20" in (await refusal(decoders, b"hang")).message


@pytest.mark.skipif(sys.platform != "linux", reason="macOS does not keep the limit")
async def test_a_file_that_takes_too_much_memory_is_refused_by_the_limit() -> None:
    async with running(memory=300 << 20) as decoders:
        failure = await refusal(decoders, wide_png(8000))
        assert failure.code == "media_limit_exceeded"
        assert "decoder_memory_bytes = 3.14573e+08" in failure.message
        await decode(decoders, picture(30, 30))


async def test_a_video_of_many_frames_takes_no_more_memory_than_one_of_few() -> None:
    """Frames go as they have been shown; 60 of them with a scaler each would take a gigabyte for its threads."""
    async with running(memory=300 << 20) as decoders:
        made = await decode(decoders, video_bytes(video_frames(60, 360, 640), fps=2), "video")
    assert made.grid[0] == 60


@pytest.mark.parametrize(
    ("data", "kind", "message"),
    [
        (scans_jpeg(64, 2000), "image", "more than 100 scans"),
        (canvas_gif(8000, 3000), "video", "video_decode_s = 120"),
    ],
)
async def test_bombs_are_refused_by_their_headers(data: bytes, kind: MediaKind, message: str) -> None:
    async with running() as decoders:
        assert message in (await refusal(decoders, data, kind)).message
        assert decoders._slow._idle == [], "nothing was decoded"


async def test_files_that_take_long_do_not_hold_up_others() -> None:
    """Two long videos, one decoder a lane: the pictures that come after them are done before them."""
    async with running() as decoders:
        plan = await decoders.plan(Media("video", "p"), LONG)
        bombs = [asyncio.create_task(decoders.patches(plan, LONG)) for _ in range(2)]
        for seed in range(5):
            await decode(decoders, picture(40, 40, seed=seed))
        assert not any(bomb.done() for bomb in bombs)
        for bomb in bombs:
            bomb.cancel()
        await asyncio.gather(*bombs, return_exceptions=True)


async def test_what_takes_longer_than_a_slice_begins_again_in_the_slow_lane(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool, "SLICE_S", 0)
    begun, start = asyncio.Event(), WorkerPool._start

    async def started(lane: WorkerPool) -> tuple[process.WorkerProcess, bytes]:
        if lane is decoders._slow:
            begun.set()
        return await start(lane)

    monkeypatch.setattr(WorkerPool, "_start", started)
    async with running(planted=tmp_path) as decoders:
        spinning = asyncio.create_task(refusal(decoders, b"spin"))
        await begun.wait()
        monkeypatch.undo()  # a picture may take longer than no time
        await decode(decoders, picture(30, 30))
        assert not spinning.done()
        spinning.cancel()
        await asyncio.gather(spinning, return_exceptions=True)


async def test_small_images_are_read_together_and_are_what_the_processor_makes(monkeypatch: pytest.MonkeyPatch) -> None:
    carried: list[int] = []
    call = WorkerPool.call

    async def counted(lane: WorkerPool, task: bytes, fds: Sequence[int] = (), *, twice: bool = True) -> bytes:
        told = from_encoder.decode(task)
        carried.append(len(told.files) if isinstance(told, SmallTask) else 0)
        return await call(lane, task, fds, twice=twice)

    monkeypatch.setattr(WorkerPool, "call", counted)
    files = [picture(40 + 28 * seed, 90, seed=seed) for seed in range(11)]
    processor = Processor(SETTINGS, LIMITS, VISION, FONT)
    plans = [processor.plan(Media("image", "p"), data) for data in files]
    async with running(processes=2) as decoders:
        made = await asyncio.gather(*(decoders.read_small(Media("image", "p"), data) for data in files))
        assert sorted(carried) == [5, 6], "a share for each process"
        del carried[:]
        await asyncio.gather(*(decoders.read_small(Media("image", "p"), files[0]) for _ in range(18)))
        assert sorted(carried) == [2, 8, 8]
    for data, plan, (told, patches) in zip(files, plans, made, strict=True):
        assert told == plan
        assert patches is not None
        expected = patches_of(processor, plan, data)
        assert patches.grid == expected.grid
        assert np.array_equal(patches.rows, expected.rows)
        assert patches.rows.flags.writeable


async def read_small(decoders: Decoders, data: bytes) -> Patches:
    """Decode a file among others, or alone if that is what is left."""
    plan, patches = await decoders.read_small(Media("image", "p"), data)
    return await decoders.patches(plan, data) if patches is None else patches


@pytest.mark.parametrize("bad", [b"crash", b"raise"])
async def test_of_images_read_together_only_the_bad_ones_are_refused(tmp_path: Path, bad: bytes) -> None:
    files = [picture(40, 40), bad, picture(60, 60)[:300], picture(50, 50)]
    async with running(planted=tmp_path) as decoders:
        first, failed, broken, last = await asyncio.gather(
            *(read_small(decoders, data) for data in files), return_exceptions=True
        )
        for error, words in ((failed, "crash" if bad == b"crash" else "not an image"), (broken, "truncated or")):
            assert isinstance(error, RequestError)
            assert error.failure.status == 400
            assert words in error.failure.message
        for made, data in ((first, files[0]), (last, files[3])):
            assert isinstance(made, Patches)
            assert np.array_equal(made.rows, (await decode(decoders, data)).rows)


async def test_an_image_that_takes_long_among_others_is_read_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool, "SLICE_S", 0)
    monkeypatch.setattr(small_images, "SLICE_S", 0)
    async with running(image_s=1, planted=tmp_path) as decoders:
        files = [picture(40, 40), b"spin"]
        reading = (read_small(decoders, data) for data in files)
        good, spinning = await asyncio.gather(*reading, return_exceptions=True)
        assert isinstance(good, Patches)
        assert isinstance(spinning, RequestError)
        assert "image_decode_s = 1" in spinning.failure.message


@pytest.mark.parametrize("limit", ["ROOM_BYTES", "MOST_WORK"])
async def test_a_small_file_of_many_pixels_is_planned_and_not_decoded(
    limit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(small_images, limit, 4096)
    async with running() as decoders:
        data = picture(200, 200)
        plan, patches = await decoders.read_small(Media("image", "p"), data)
        assert patches is None
        assert (await decoders.patches(plan, data)).rows.shape == plan.rows


async def test_small_images_together_are_decoded_as_far_as_their_work_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(small_images, "MOST_WORK", 2 * 40 * 40)
    async with running(processes=1) as decoders:
        read = await asyncio.gather(*(decoders.read_small(Media("image", "p"), picture(40, 40)) for _ in range(5)))
        assert [patches is None for _, patches in read] == [False, False, True, True, True]


async def test_an_image_nobody_waits_for_any_more_holds_up_no_other() -> None:
    async with running() as decoders:
        media, data = Media("image", "p"), picture(40, 40)
        reading = [asyncio.create_task(decoders.read_small(media, data)) for _ in range(4)]
        await asyncio.sleep(0)
        for task in reading[:2]:
            task.cancel()
        assert (await reading[2])[1] is not None
        assert (await reading[3])[1] is not None
        assert (await decoders.read_small(media, data))[1] is not None


async def test_where_no_process_starts_all_that_wait_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    async with running() as decoders:
        monkeypatch.setattr(process, "tethered", lambda command: ["/absent", *command])
        media, data = Media("image", "p"), picture(40, 40)
        failed = await asyncio.gather(*(decoders.read_small(media, data) for _ in range(3)), return_exceptions=True)
        assert [error.failure.status for error in failed if isinstance(error, RequestError)] == [503] * 3
        monkeypatch.undo()
        assert (await decoders.read_small(media, data))[1] is not None
