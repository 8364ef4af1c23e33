"""Directory that is written whole: until all files are there, they are in a subdirectory of it.

It may be there already, empty: a volume's mount point, where nothing can be renamed into place. A command that is
killed leaves the subdirectory behind, and the next one with the same output replaces it.
"""

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from shared.errors import ConfigError

UNFINISHED = "millrace.unfinished"


def refuse_used(output: Path) -> Path:
    """Return the path without symbolic links; it is nothing yet, or a directory that is empty or unfinished.

    Raises:
        ConfigError: it is something else.
    """
    try:
        output = output.resolve()
        if not output.exists():
            return output
        used = sorted(path.name for path in output.iterdir() if path.name != UNFINISHED)
    except (OSError, RuntimeError) as error:  # RuntimeError: a symbolic link to itself
        raise ConfigError(f"--output: {error}") from error
    if used:
        raise ConfigError(f"--output: {output} is there already, with {used[0]}; name a new or an empty directory")
    return output


@contextlib.contextmanager
def whole_directory(output: Path, last: str) -> Iterator[Path]:
    """Yield an empty directory, whose files are moved to `output` if all goes well, and deleted if not.

    Args:
        last: name of the file that is moved last, so that half of them are never taken for all.

    Raises:
        ConfigError: it cannot be made, somebody else writes it, or `refuse_used`.
    """
    output = refuse_used(output)
    with contextlib.ExitStack() as stack:
        fresh = _fresh(output, stack)
        yield fresh
        for path in sorted(fresh.iterdir(), key=lambda path: (path.name == last, path.name)):
            path.rename(output / path.name)


def _fresh(output: Path, stack: contextlib.ExitStack) -> Path:
    """Return an empty directory that is this process's alone until the stack unwinds."""
    made = not output.exists()
    unfinished = output / UNFINISHED
    try:
        try:
            unfinished.mkdir(parents=True, exist_ok=True)
        except FileNotFoundError as error:  # of a file system where nobody can make any
            raise ConfigError(f"--output: {error}") from error
        lock = stack.enter_context((unfinished / "lock").open("w"))
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Another may have ended between these lines, and have deleted what we hold.
        if os.fstat(lock.fileno()).st_ino != (unfinished / "lock").stat().st_ino:
            raise FileNotFoundError
        stack.callback(_delete, output, made)
        refuse_used(output)
        if (unfinished / "files").exists():
            shutil.rmtree(unfinished / "files")
        (unfinished / "files").mkdir()
    except (BlockingIOError, FileNotFoundError) as error:
        raise ConfigError(f"--output: another command is writing {output}") from error
    except OSError as error:
        raise ConfigError(f"--output: {error}") from error
    return unfinished / "files"


def _delete(output: Path, made: bool) -> None:
    shutil.rmtree(output / UNFINISHED, ignore_errors=True)
    if made:
        with contextlib.suppress(OSError):  # it has the files now
            output.rmdir()
