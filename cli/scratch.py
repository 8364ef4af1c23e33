"""Directory of one `millrace serve` for what nobody needs after it: Redis's socket and data, metrics, and segments.

A `millrace serve` that is killed leaves it behind, and the next one of the same user removes it.
"""

import contextlib
import fcntl
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

LOCK = "lock"  # of a directory in use; the kernel lets go of it with the process


@contextlib.contextmanager
def scratch_directory(prefix: str, parent: Path | None = None) -> Iterator[Path]:
    """Yield an empty directory and delete it afterwards; first remove those that nobody uses any more.

    `prefix`: what its name begins with, "millrace-" and more. Without a `parent` it is in the temporary directory.
    """
    parent = Path(tempfile.gettempdir()) if parent is None else parent
    if sys.platform == "linux":  # elsewhere a Redis may have outlived its `millrace serve` (shared/tether.py)
        _remove_abandoned(parent)
    with tempfile.TemporaryDirectory(prefix=prefix, dir=parent) as name:
        directory = Path(name)
        with (directory / "locking").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            Path(lock.name).rename(directory / LOCK)  # only now: who finds a lock that is free removes its directory
            yield directory


def _remove_abandoned(parent: Path) -> None:
    for lock in parent.glob(f"millrace-*/{LOCK}"):
        with contextlib.suppress(OSError):  # it is in use, somebody else's, or another start removes it
            if lock.parent.is_symlink() or lock.parent.stat().st_uid != os.getuid():
                continue
            with lock.open("r+") as opened:
                fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(lock.parent, ignore_errors=True)
