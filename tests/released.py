"""Look at what is in memory although nobody needs it: behind reference cycles, which the garbage collector ends."""

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def without_collector() -> Iterator[None]:
    """Run a block in which cycles stay. What is there before, also of other tests, counts for nothing."""
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def held(*kinds: type) -> set[str]:
    """The names of those kinds of which an object is in memory that was made in the block."""
    return {type(each).__name__ for each in gc.get_objects() if type(each) in kinds}
