"""Page that an engine and the encoders of its GPU share: a file of 64 bytes, mapped by both.

Two processes of one GPU take turns of some milliseconds, so a step of the engine takes twice as long beside a pass of
the vision tower. Here each says when it needs the card, and the other leaves it more of it:

bytes     written by     what
0 to 8    the engine     MAGIC
8 to 24   the engine     which GPU: the first bytes of a hash of its UUID
24 to 32  the engine     when the step began that sequences wait for tokens of; odd: it has prefill, too; 0: none waits
32 to 40  the encoders   when one of them last sent work to the GPU

Times are nanoseconds of the machine's monotonic clock. One that is old, or is to come, counts as none, so an end that
dies leaves nothing that holds the other up. Nothing here changes a result. A word is written at once, and no two are
read together.
"""

import contextlib
import fcntl
import hashlib
import mmap
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Self

from shared.segments import CARDS, Segments, is_marked, locked_file

MAGIC = b"mrcard01"
SIZE = 64
STEP, ENCODER = 3, 4  # words of 8 bytes; the head is before
STALE_NS = 100_000_000  # four times what a step is planned to take at most
PREFILL = 1

Clock = Callable[[], int]


class CardPage:
    """A mapped page. Its memory is freed with it."""

    def __init__(self, mapped: mmap.mmap | bytearray, clock: Clock = time.monotonic_ns) -> None:
        self._words = memoryview(mapped).cast("Q")
        self._clock = clock

    @property
    def head(self) -> bytes:
        """Bytes that tell a page, and of which GPU it is."""
        return bytes(self._words[:STEP])

    def begin_step(self, prefill: bool) -> None:
        """Say that a step has begun that sequences wait for. `prefill`: it computes prefill of others, too."""
        self._words[STEP] = (self._clock() - 2) & ~PREFILL | prefill  # not in the future

    def end_step(self) -> None:
        """Say that nobody waits for tokens."""
        self._words[STEP] = 0

    def step(self) -> int:
        """Return what tells the step that sequences wait for from others; 0 if none do."""
        return self._recent(STEP)

    def note_work(self) -> None:
        """Say that work was sent to the GPU."""
        self._words[ENCODER] = self._clock()

    def encoder_works(self) -> bool:
        """Return True if an encoder has just sent work to the GPU."""
        return self._recent(ENCODER) != 0

    def _recent(self, word: int) -> int:
        when = self._words[word]
        return when if 0 <= self._clock() - when < STALE_NS else 0


class OwnPage:
    """An engine's page in a directory of segments, there until its block ends, or the process.

    Raises:
        OSError: it cannot be made.
    """

    def __init__(self, segments: Segments, name: str, card: str) -> None:
        """`card`: a GPU's UUID."""
        self._path = segments.directory / CARDS / hashlib.sha256(name.encode()).hexdigest()
        self._fd = locked_file(self._path)
        try:
            # Written over, not made anew: whoever has mapped it for an engine that had this name must not lose its
            # memory. And written, not mapped first: a file system that is full is an error here, and a signal there.
            os.pwrite(self._fd, (MAGIC + _card_id(card)).ljust(SIZE, b"\0"), 0)
            self.page = CardPage(mmap.mmap(self._fd, SIZE))
        except BaseException:
            self._close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def _close(self) -> None:
        fcntl.flock(self._fd, fcntl.LOCK_UN)  # what is mapped has the file open, too
        os.close(self._fd)
        is_marked(self._path)  # which removes it, unless an engine of the same name has it


class CardPages:
    """Pages of the engines that live and use one GPU, as an encoder of it finds them."""

    def __init__(self, segments: Segments, card: str) -> None:
        self._directory = segments.directory / CARDS
        self._head = MAGIC + _card_id(card)
        self._found: dict[tuple[Path, int], CardPage] = {}  # by path and inode, as an engine's name may come again

    def refresh(self) -> list[CardPage]:
        """Return the pages that there are now; remove those of dead engines."""
        found: dict[tuple[Path, int], CardPage] = {}
        with contextlib.suppress(OSError):  # somebody has removed the directory, or a file by now
            for path in filter(is_marked, self._directory.iterdir()):
                which = path, path.stat().st_ino
                page = self._found.get(which) or self._map(path)
                if page is not None and page.head == self._head:  # an engine of this name may be on another GPU now
                    found[which] = page
        self._found = found
        return list(found.values())

    @staticmethod
    def _map(path: Path) -> CardPage | None:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            return CardPage(mmap.mmap(fd, SIZE))
        except ValueError:  # it is shorter: not written yet
            return None
        finally:
            os.close(fd)


def _card_id(card: str) -> bytes:
    return hashlib.sha256(card.encode()).digest()[:16]
