"""The page that an engine and encoders of its GPU share, across processes and the death of either."""

import errno
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from shared.card_page import ENCODER, MAGIC, PREFILL, SIZE, STALE_NS, STEP, CardPage, CardPages, OwnPage
from shared.segments import CARDS, Segments, is_marked, locked_file

ENGINE = """
import sys
from pathlib import Path
from shared.card_page import OwnPage
from shared.segments import Segments

own = OwnPage(Segments(Path(sys.argv[1])), sys.argv[2], sys.argv[3])
own.page.begin_step(True)
print("ready", flush=True)
for line in sys.stdin:
    print(own.page._words[4], flush=True)
"""


class Clock:
    def __init__(self) -> None:
        self.now = 10 * STALE_NS

    def __call__(self) -> int:
        return self.now


class Page(CardPage):
    """A page of memory of our own."""

    def __init__(self, clock: Clock) -> None:
        super().__init__(bytearray(SIZE), clock)


@contextmanager
def engine(directory: Path, name: str = "e", card: str = "GPU-1") -> Iterator["subprocess.Popen[str]"]:
    """Run an engine's end in another process; it computes a step."""
    process = subprocess.Popen(
        [sys.executable, "-c", ENGINE, str(directory), name, card],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield process
        process.kill()


def files(directory: Path) -> list[str]:
    return os.listdir(directory / CARDS)


def test_a_step_is_seen_until_it_ends_or_is_too_old_to_be_believed() -> None:
    clock = Clock()
    page = Page(clock)
    assert page.step() == 0
    page.begin_step(False)
    decode = page.step()
    assert decode
    assert not decode & PREFILL
    clock.now += STALE_NS - 3
    assert page.step() == decode
    clock.now += 3
    assert page.step() == 0, "its engine has died, or hangs"
    page.begin_step(True)
    assert page.step() & PREFILL
    assert page.step() != decode
    clock.now -= 3
    assert page.step() == 0, "what is to come nobody has written"
    clock.now += 3
    page.end_step()
    assert page.step() == 0


def test_an_encoder_works_for_as_long_as_it_says_so() -> None:
    clock = Clock()
    page = Page(clock)
    assert not page.encoder_works()
    page.note_work()
    assert page.encoder_works()
    assert page.step() == 0
    clock.now += STALE_NS
    assert not page.encoder_works()


@pytest.mark.system
def test_both_ends_see_each_other_and_a_killed_engine_leaves_nothing(tmp_path: Path) -> None:
    pages = CardPages(Segments(tmp_path / "segments"), "GPU-1")
    assert pages.refresh() == []
    with engine(tmp_path / "segments") as process:
        assert process.stdin is not None
        assert process.stdout is not None
        [page] = pages.refresh()
        assert page._words[STEP] > 0, "the step that it began"
        process.stdin.write("\n")
        process.stdin.flush()
        assert process.stdout.readline() == "0\n"
        page.note_work()
        process.stdin.write("\n")
        process.stdin.flush()
        assert int(process.stdout.readline()) == page._words[ENCODER] > 0
        assert pages.refresh() == [page], "mapped once"
        process.send_signal(signal.SIGKILL)
        process.wait()
        page.note_work()  # into memory that nobody reads
        assert pages.refresh() == []
        assert files(tmp_path / "segments") == []


@pytest.mark.system
def test_an_engine_of_the_same_name_has_a_page_of_its_own(tmp_path: Path) -> None:
    """As a container that starts again in its pod."""
    pages = CardPages(Segments(tmp_path / "segments"), "GPU-1")
    with engine(tmp_path / "segments") as process:
        [before] = pages.refresh()
        process.kill()
        process.wait()
        assert not CardPages(Segments(tmp_path / "segments"), "GPU-2").refresh(), "which removes the file"
    with engine(tmp_path / "segments"):
        [after] = pages.refresh()
        assert after is not before
        assert after._words[STEP] > before._words[STEP]


def test_engines_of_other_gpus_are_not_ours_to_wait_for(tmp_path: Path) -> None:
    segments = Segments(tmp_path / "segments")
    with OwnPage(segments, "a", "GPU-1") as one, OwnPage(segments, "b", "GPU-2"):
        [page] = CardPages(segments, "GPU-1").refresh()
        page.note_work()
        assert one.page.encoder_works()
        assert CardPages(segments, "GPU-3").refresh() == []
    assert CardPages(segments, "GPU-1").refresh() == []


def test_an_engine_that_comes_again_on_another_gpu_is_no_longer_ours(tmp_path: Path) -> None:
    """It writes over the file of its name, which a living engine of the same name may have kept."""
    segments = Segments(tmp_path / "segments")
    pages, others = CardPages(segments, "GPU-1"), CardPages(segments, "GPU-2")
    with OwnPage(segments, "e", "GPU-1"):
        assert (len(pages.refresh()), len(others.refresh())) == (1, 0)
        with OwnPage(segments, "e", "GPU-2") as own:
            assert pages.refresh() == []
            [page] = others.refresh()
            page.note_work()
            assert own.page.encoder_works()


def test_a_clean_end_leaves_nothing(tmp_path: Path) -> None:
    segments = Segments(tmp_path / "segments")
    for number in range(3):
        with OwnPage(segments, f"e{number}", "GPU-1") as own:
            assert len(files(segments.directory)) == 1
        assert files(segments.directory) == []
        own.page.end_step()
    with OwnPage(segments, "e", "GPU-1"):
        with OwnPage(segments, "e", "GPU-1"):
            pass
        assert len(files(segments.directory)) == 1, "the other one still has it"
    shutil.rmtree(segments.directory)
    other = Segments(tmp_path / "other")
    with OwnPage(other, "e", "GPU-1"):
        shutil.rmtree(other.directory)


def test_a_page_that_finds_no_memory_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system that is full can still name a file."""

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    segments = Segments(tmp_path / "segments")
    before = os.listdir("/proc/self/fd")
    with monkeypatch.context() as patched:
        patched.setattr(os, "pwrite", full)
        with pytest.raises(OSError, match="No space"):
            OwnPage(segments, "e", "GPU-1")
    assert files(segments.directory) == []
    assert len(os.listdir("/proc/self/fd")) == len(before)
    with OwnPage(segments, "e", "GPU-1"):
        assert len(CardPages(segments, "GPU-1").refresh()) == 1


def test_a_file_that_has_its_name_no_more_does_not_take_it_from_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two look for the dead at once: one removes the file, and an engine makes it anew before the other locks."""
    path = tmp_path / "e"
    path.touch()
    real, made = os.open, []

    def slow(*args: object, **more: object) -> int:
        fd = real(*args, **more)  # type: ignore[arg-type]
        if not made:
            monkeypatch.setattr(os, "open", real)
            assert not is_marked(path)
            made.append(locked_file(path))
        return fd

    monkeypatch.setattr(os, "open", slow)
    is_marked(path)
    assert path.exists()
    assert is_marked(path)
    os.close(made[0])


def test_what_is_no_page_is_passed_over(tmp_path: Path) -> None:
    """One that is not written yet, and one of another layout."""
    segments = Segments(tmp_path / "segments")
    with OwnPage(segments, "a", "GPU-1"), OwnPage(segments, "b", "GPU-1"):
        one, other = (segments.directory / CARDS).iterdir()
        os.truncate(one, 0)
        other.write_bytes((MAGIC[:-1] + b"2").ljust(SIZE))
        assert CardPages(segments, "GPU-1").refresh() == []
    shutil.rmtree(segments.directory)
    assert CardPages(segments, "GPU-1").refresh() == [], "and no directory is no reason to fail"
