"""Integer arithmetic of launch sizes. Triton's own functions take microseconds each on the host, and a step that is not
captured calls them hundreds of times.
"""


def ceil_div(count: int, each: int) -> int:
    return -(-count // each)


def ceil_pow2(count: int) -> int:
    """Return the least power of two that is not below `count`, which is positive."""
    return 1 << (count - 1).bit_length()
