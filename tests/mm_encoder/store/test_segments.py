"""Segments: what a directory may hold, for how long, and who is known to see it."""

import _ctypes
import asyncio
import errno
import mmap
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from machine import PATIENCE_S

from services.mm_encoder.store import segments as segment_store
from services.mm_encoder.store.segments import LARGE, RECENT_S, UNFINISHED_S, SegmentStore, Unwritten
from shared import segments as shared_segments
from shared.card_page import OwnPage
from shared.errors import ConfigError
from shared.segments import CARDS, READERS, Reader, Segments

TTL_S = 3600
BUDGET = 1000
DATA = memoryview(bytes(range(100)))


class Engines:
    """Names of the engines that live."""

    def __init__(self) -> None:
        self.names: list[str] = []

    async def __call__(self) -> list[str]:
        return self.names


@pytest.fixture
def engines() -> Engines:
    return Engines()


@pytest.fixture
def store(tmp_path: Path, engines: Engines) -> SegmentStore:
    return SegmentStore(tmp_path / "segments", BUDGET, TTL_S, engines)


@pytest.fixture
def segments(store: SegmentStore, tmp_path: Path) -> Segments:
    """As an engine has it."""
    return Segments(tmp_path / "segments")


def used_ago(segments: Segments, key: str, seconds: float) -> None:
    then = time.time() - seconds
    os.utime(segments.path(key), (then, then))


def names(segments: Segments) -> set[str]:
    return {path.name for path in segments.directory.iterdir()} - {READERS, CARDS}


async def test_an_engine_reads_what_was_written(store: SegmentStore, segments: Segments) -> None:
    assert segments.read("cat") is None
    assert not store.holds("cat")
    assert await store.write("cat", DATA)
    assert store.holds("cat")
    assert segments.read("cat") == DATA
    assert segments.path("cat").stat().st_mode & 0o077 == 0
    assert segments.directory.stat().st_mode & 0o077 == 0


@pytest.mark.skipif(sys.platform != "linux", reason="the pages of a process are in its /proc")
@pytest.mark.parametrize("kernel", ["new", "old"])
async def test_all_pages_are_there_and_no_thread_waits_for_them(
    tmp_path: Path, engines: Engines, monkeypatch: pytest.MonkeyPatch, kernel: str
) -> None:
    """`mmap.mmap` of Python 3.11 and `mmap.madvise` of any have the interpreter's lock: neither may take pages in."""
    data, flags, map_file = memoryview(os.urandom(LARGE)), [], mmap.mmap

    class Mapped(mmap.mmap):
        def __new__(cls, *args: int, **words: int) -> "Mapped":
            flags.append(words["flags"])
            return super().__new__(cls, *args, **words)

        def madvise(self, *args: int) -> None:
            pytest.fail("under the lock")

    monkeypatch.setattr(mmap, "mmap", Mapped)
    store = SegmentStore(tmp_path / "segments", 2 * LARGE, TTL_S, engines)
    assert await store.write("cat", data)
    if kernel == "old":
        monkeypatch.setattr(shared_segments, "_POPULATE_READ", -1)  # it knows no such advice
    view = store.read("cat")
    assert flags == [mmap.MAP_SHARED]
    assert view is not None
    assert isinstance(view.obj, map_file)
    assert resident(store._segments.path("cat")) == LARGE
    assert view == data
    assert not shared_segments._MADVISE._flags_ & _ctypes.FUNCFLAG_PYTHONAPI, "which would keep the lock"


def resident(path: Path) -> int:
    """Return how many bytes of a mapped file have pages in this process."""
    lines = iter(Path("/proc/self/smaps").read_text().splitlines())
    assert any(line.endswith(f" {path}") for line in lines)
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("Rss:"))


async def test_what_is_mapped_stays(store: SegmentStore, segments: Segments) -> None:
    await store.write("cat", DATA)
    mapped = segments.read("cat")
    await store.write("cat", DATA[1:])
    segments.path("cat").unlink()
    assert mapped == DATA


@pytest.mark.parametrize("key", ["", "..", "../../etc/passwd", "a/b", "\0"])
async def test_a_key_is_no_path(store: SegmentStore, segments: Segments, key: str) -> None:
    assert segments.path(key).parent == segments.directory
    assert await store.write(key, DATA)
    assert segments.read(key) == DATA


async def test_an_empty_file_is_no_segment(segments: Segments) -> None:
    segments.path("cat").touch()
    assert segments.read("cat") is None


async def test_what_was_used_longest_ago_makes_room(store: SegmentStore, segments: Segments) -> None:
    for number in range(10):
        assert await store.write(str(number), DATA)
        used_ago(segments, str(number), RECENT_S + 100 - number)
    assert segments.read("0") == DATA
    assert store.holds("1")
    assert await store.write("new", DATA)
    left = [key for key in (*map(str, range(10)), "new") if store.holds(key)]
    assert left == ["0", "1", "5", "6", "7", "8", "9", "new"], "and room for an eighth more"


async def test_what_may_not_have_been_read_yet_stays(store: SegmentStore, segments: Segments) -> None:
    for number in range(10):
        assert await store.write(str(number), DATA)
    assert not await store.write("big", memoryview(bytes(101)))
    used_ago(segments, "0", RECENT_S + 10)
    another = SegmentStore(segments.directory, BUDGET, TTL_S, Engines())
    assert not await another.write("big", memoryview(bytes(101)))
    assert store.holds("0"), "it would not have been enough"
    used_ago(segments, "0", RECENT_S + 10)
    assert await SegmentStore(segments.directory, BUDGET, TTL_S, Engines()).write("big", memoryview(bytes(100)))
    assert names(segments) == {segments.path(key).name for key in (*map(str, range(1, 10)), "big")}


async def test_many_writes_at_once_stay_within_the_budget(tmp_path: Path) -> None:
    """Also while files of a directory get their names: a list of it may have neither name of one of them."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)  # threads take turns in the middle of everything
    try:
        for attempt in range(30):
            store = SegmentStore(tmp_path / str(attempt), BUDGET, TTL_S, Engines())
            written = await asyncio.gather(*(store.write(str(number), DATA) for number in range(30)))
            assert sum(written) == 10
            assert [store.holds(str(number)) for number in range(30)] == written
    finally:
        sys.setswitchinterval(interval)


async def test_what_other_encoders_write_counts(store: SegmentStore, segments: Segments) -> None:
    """At most an eighth of the budget is written between two looks at the directory."""
    another = SegmentStore(segments.directory, BUDGET, TTL_S, Engines())
    written = [await each.write(f"{each} {number}", DATA) for number in range(10) for each in (store, another)]
    assert 10 <= sum(written) <= 12


async def test_a_full_directory_is_not_listed_for_every_write(
    tmp_path: Path, engines: Engines, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, looks, scandir = SegmentStore(tmp_path / "segments", 10_000, TTL_S, engines), 0, os.scandir

    def look(path: str) -> object:
        nonlocal looks
        looks += 1
        return scandir(path)

    monkeypatch.setattr(os, "scandir", look)
    segments = Segments(tmp_path / "segments")
    for number in range(200):
        assert await store.write(str(number), DATA)
        used_ago(segments, str(number), RECENT_S + 1000 - number)
    assert len(names(segments)) >= 80
    assert looks <= 30


async def test_more_than_the_budget_is_not_written(store: SegmentStore, segments: Segments) -> None:
    await store.write("cat", DATA)
    used_ago(segments, "cat", RECENT_S + 10)
    assert not await store.write("dog", memoryview(bytes(BUDGET + 1)))
    assert names(segments) == {segments.path("cat").name}


async def test_a_file_system_keeps_some_room(
    store: SegmentStore, segments: Segments, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was removed may still be mapped, and takes its memory."""
    disk = SimpleNamespace(f_frsize=1, f_blocks=2 * BUDGET, f_bavail=100 + BUDGET // 8 - 1)
    monkeypatch.setattr(os, "statvfs", lambda path: disk)
    assert not await store.write("cat", DATA)
    disk.f_bavail += 1
    assert await SegmentStore(segments.directory, BUDGET, TTL_S, Engines()).write("cat", DATA)


async def test_a_full_file_system_has_old_segments_removed(
    store: SegmentStore, segments: Segments, monkeypatch: pytest.MonkeyPatch
) -> None:
    for age, key in enumerate(("cat", "dog", "cow")):
        assert await store.write(key, DATA)
        used_ago(segments, key, RECENT_S + 10 + age)

    def disk(path: Path) -> SimpleNamespace:
        return SimpleNamespace(f_frsize=1, f_blocks=2 * BUDGET, f_bavail=300 + BUDGET // 8 - 100 * len(names(segments)))

    monkeypatch.setattr(os, "statvfs", disk)
    assert await store.write("hen", DATA)
    assert store.holds("hen")
    assert not store.holds("cow")


async def test_the_budget_is_half_of_the_file_system_at_most(tmp_path: Path, engines: Engines) -> None:
    whole = os.statvfs(tmp_path)
    store = SegmentStore(tmp_path / "segments", 1 << 60, TTL_S, engines)
    assert store._budget == whole.f_frsize * whole.f_blocks // 2


@pytest.fixture
def full_file_system(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int, data: memoryview) -> int:
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(os, "write", full)


@pytest.mark.usefixtures("full_file_system")
async def test_a_full_file_system_is_no_failure(store: SegmentStore, segments: Segments) -> None:
    assert not await store.write("cat", DATA)
    assert names(segments) == set()


@pytest.mark.parametrize("size", [len(DATA), 1])
async def test_what_was_prepared_is_written(store: SegmentStore, segments: Segments, size: int) -> None:
    """Or anew, where it is of another size."""
    async with store.prepare(size) as place:
        unwritten = await place
        assert unwritten is not None
        assert names(segments) == {unwritten.path.name}
        assert unwritten.path.read_bytes() == bytes(size)
        inode = unwritten.path.stat().st_ino
        assert segments.read("cat") is None
        assert await store.write("cat", DATA, unwritten)
    assert segments.read("cat") == DATA
    assert names(segments) == {segments.path("cat").name}
    assert (segments.path("cat").stat().st_ino == inode) == (size == len(DATA))


async def test_pages_of_more_than_one_write_are_prepared(tmp_path: Path, engines: Engines) -> None:
    size = 2 * LARGE + 4096
    store = SegmentStore(tmp_path / "segments", 4 * size, TTL_S, engines)
    async with store.prepare(size) as place:
        unwritten = await place
        assert unwritten is not None
        stat = unwritten.path.stat()
        assert (stat.st_size, stat.st_blocks * 512 >= size) == (size, True)


async def test_what_was_prepared_and_not_written_is_removed(store: SegmentStore, segments: Segments) -> None:
    waits = asyncio.Event()

    async def encode() -> None:
        async with store.prepare(len(DATA)) as place:
            await place
            waits.set()
            await asyncio.Event().wait()

    task = asyncio.create_task(encode())
    await waits.wait()
    assert len(names(segments)) == 1
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert names(segments) == set()


@pytest.mark.parametrize("cancelled", [1, 2])
@pytest.mark.parametrize("stopped", ["before its file", "in the middle", "at the end"])
async def test_what_is_prepared_for_nobody_is_removed(
    tmp_path: Path, engines: Engines, monkeypatch: pytest.MonkeyPatch, stopped: str, cancelled: int
) -> None:
    """However often a waiter is cancelled, and wherever the thread is meanwhile."""
    size = 3 * LARGE
    store = SegmentStore(tmp_path / "segments", 4 * size, TTL_S, engines)
    reached, go_on, ended = asyncio.Event(), threading.Event(), asyncio.Event()
    loop, prepare, create, write = asyncio.get_running_loop(), store._prepare, segment_store._create, os.write
    written = 0

    def stop() -> None:
        loop.call_soon_threadsafe(reached.set)
        assert go_on.wait(PATIENCE_S)

    def stop_before(path: Path, size: int) -> None:
        if stopped == "before its file":
            stop()
        create(path, size)

    def stop_within(fd: int, data: memoryview) -> int:
        nonlocal written
        written += (count := write(fd, data))
        if written == {"in the middle": LARGE, "at the end": size}.get(stopped):
            stop()
        return count

    def say_the_end(unwritten: Unwritten) -> Unwritten | None:
        try:
            return prepare(unwritten)
        finally:
            loop.call_soon_threadsafe(ended.set)

    monkeypatch.setattr(segment_store, "_create", stop_before)
    monkeypatch.setattr(os, "write", stop_within)
    monkeypatch.setattr(store, "_prepare", say_the_end)

    async def encode() -> None:
        async with store.prepare(size) as place:
            await place

    task = asyncio.create_task(encode())
    await reached.wait()
    for _ in range(cancelled):
        task.cancel()
        await asyncio.sleep(0)
    go_on.set()
    await asyncio.gather(task, return_exceptions=True)
    await ended.wait()
    assert names(Segments(tmp_path / "segments")) == set()
    assert written == {"before its file": 0, "in the middle": LARGE, "at the end": size}[stopped]


async def test_what_was_prepared_counts(store: SegmentStore) -> None:
    async with store.prepare(BUDGET) as place:
        assert await place is not None
        assert not await store.write("cat", DATA)
        async with SegmentStore(store._segments.directory, BUDGET, TTL_S, Engines()).prepare(len(DATA)) as another:
            assert await another is None


async def test_what_was_prepared_long_ago_is_written_anew(store: SegmentStore, segments: Segments) -> None:
    async with store.prepare(len(DATA)) as place:
        unwritten = await place
        assert unwritten is not None
        os.utime(unwritten.path, (1, 1))
        await SegmentStore(segments.directory, BUDGET, TTL_S, Engines()).sweep()
        assert names(segments) == set()
        assert await store.write("cat", DATA, unwritten)
    assert segments.read("cat") == DATA


@pytest.mark.usefixtures("full_file_system")
async def test_nothing_is_prepared_where_nothing_can_be_written(store: SegmentStore, segments: Segments) -> None:
    async with store.prepare(len(DATA)) as place:
        assert await place is None
        assert names(segments) == set()
    shutil.rmtree(segments.directory)
    async with store.prepare(len(DATA)) as place:
        assert await place is None


async def test_a_directory_that_was_removed_is_no_failure(store: SegmentStore, segments: Segments) -> None:
    shutil.rmtree(segments.directory)
    assert not await store.write("cat", DATA)
    assert segments.read("cat") is None
    await store.sweep()


async def test_what_is_old_is_removed(store: SegmentStore, segments: Segments) -> None:
    for key, age in (("cat", TTL_S - 60), ("dog", TTL_S + 60)):
        await store.write(key, DATA)
        used_ago(segments, key, age)
    for name, ago in ((".new-young", 0.0), (".new-old", UNFINISHED_S + 60)):
        path = segments.directory / name
        path.write_bytes(DATA)
        os.utime(path, (time.time() - ago, time.time() - ago))
    await store.sweep()
    assert names(segments) == {segments.path("cat").name, ".new-young"}


@pytest.mark.parametrize("name", ["sem.other", "A" * 64, "a" * 63, "a" * 65, "new-1", ".new"])
async def test_files_of_others_are_left_alone(store: SegmentStore, segments: Segments, name: str) -> None:
    path = segments.directory / name
    path.write_bytes(bytes(BUDGET))
    os.utime(path, (1, 1))
    await store.sweep()
    for number in range(11):
        await store.write(str(number), DATA)
    assert path.read_bytes() == bytes(BUDGET)
    assert len(names(segments)) == 11


async def test_who_sees_the_directory(store: SegmentStore, segments: Segments, engines: Engines) -> None:
    assert not await store.reaches_all(), "there is no engine"
    engines.names = ["a", "b"]
    a = Reader(segments, "a")
    assert not await store.reaches_all()
    b = Reader(segments, "b")
    assert await store.reaches_all()
    again = Reader(segments, "b")
    b.close()
    assert await store.reaches_all(), "one that was started again under its name"
    again.close()
    assert not await store.reaches_all()
    await store.sweep()
    a.close()
    assert len(list((segments.directory / READERS).iterdir())) == 1
    await store.sweep()
    assert list((segments.directory / READERS).iterdir()) == []


async def test_a_sweep_removes_the_pages_of_dead_engines(store: SegmentStore, segments: Segments) -> None:
    """Beside encoders that look for none: on CPUs, or with whole passes."""
    dead = segments.directory / CARDS / "dead"
    dead.touch()
    with OwnPage(segments, "a", "GPU-1"):
        await store.sweep()
        [living] = (segments.directory / CARDS).iterdir()
    assert living != dead


@pytest.mark.system
def test_a_dead_engine_sees_nothing(store: SegmentStore, segments: Segments, engines: Engines) -> None:
    engines.names = ["a"]
    program = (
        "import sys; from pathlib import Path; from shared.segments import *\n"
        "reader = Reader(Segments(Path(sys.argv[1])), 'a'); print('marked', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", program, str(segments.directory)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"marked\n"
        assert asyncio.run(store.reaches_all())
        process.kill()
    assert not asyncio.run(store.reaches_all())


@pytest.mark.parametrize("make", [Segments, lambda path: SegmentStore(path, 1, 1, Engines())])
def test_a_place_that_cannot_be_used(tmp_path: Path, make: type[Segments]) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"MILLRACE_SEGMENTS_DIR: .*file/segments cannot be used"):
        make(tmp_path / "file" / "segments")


@pytest.mark.parametrize("make", [Segments, lambda path: SegmentStore(path, 1, 1, Engines())])
@pytest.mark.parametrize(("mode", "said"), [(0o777, "777"), (0o1777, "1777"), (0o770, "770"), (0o720, "720")])
def test_where_others_may_write_nothing_is_done(tmp_path: Path, make: type[Segments], mode: int, said: str) -> None:
    """As in a pod's volume that has an fsGroup; a directory in it is made."""
    open_to_all = tmp_path / "open"
    open_to_all.mkdir()
    open_to_all.chmod(mode)
    with pytest.raises(ConfigError, match=rf"MILLRACE_SEGMENTS_DIR: .*others may write in it \(mode {said}\); name a "):
        make(open_to_all)
    assert open_to_all.stat().st_mode & 0o7777 == mode
    assert list(open_to_all.iterdir()) == []
    make(open_to_all / "ours")
    assert (open_to_all / "ours").stat().st_mode & 0o777 == 0o700


def test_a_directory_that_others_may_read_is_left_so(tmp_path: Path) -> None:
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours").chmod(0o755)
    Segments(tmp_path / "ours")
    assert (tmp_path / "ours").stat().st_mode & 0o777 == 0o755


def test_another_users_directory_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    we = os.geteuid()
    (tmp_path / "theirs").mkdir(mode=0o700)
    monkeypatch.setattr(os, "geteuid", lambda: we + 1)
    with pytest.raises(ConfigError, match=f"it belongs to user {we}, and we are {we + 1}"):
        Segments(tmp_path / "theirs")


@pytest.mark.parametrize("link", ["ours", f"ours/{READERS}"])
def test_links_are_not_followed(tmp_path: Path, link: str) -> None:
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    (tmp_path / link).parent.mkdir(mode=0o700, exist_ok=True)
    (tmp_path / link).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="it is a symbolic link"):
        Segments(tmp_path / "ours")
    assert list((tmp_path / "elsewhere").iterdir()) == []
