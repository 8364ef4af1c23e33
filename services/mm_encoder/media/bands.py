"""Resizing of one large image by several threads, to the bit as Pillow resizes it whole.

Pillow goes along each direction once, and rounds to 8 bits in between. Going along rows, no row depends on another, and
along columns no column; so bands of either are resized apart. Which direction comes first decides what is rounded.
Pillow 13 begins with the columns where the height shrinks by more than twice what the width does, and older ones never.
What the installed one does is found out once, by small images; where it does neither, images are resized whole.
"""

from collections.abc import Callable
from functools import cache, partial
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from services.mm_encoder.media.image import resized
from services.mm_encoder.media.patches import fill_blocks, patch_blocks
from services.mm_encoder.media.turns import Turns

LEAST_PIXELS = 1 << 20  # before and after: with fewer, handing bands to threads takes what they save
BAND_PIXELS = 1 << 20  # of what a pass reads, about, if there are more bands than threads: it cuts a band out as a copy

Size = tuple[int, int]  # width, height
Rule = Callable[[Size, Size], bool]  # of the size before and after: whether rows come first

# Sizes before and after, with which either order comes first by the rule of Pillow 13.
_PROBES = ((24, 60, 25, 30), (24, 60, 20, 50), (60, 24, 50, 20), (24, 60, 30, 59), (24, 60, 25, 62), (24, 24, 20, 16))


def fill_in_bands(
    rows: NDArray[np.uint8], image: Image.Image, height: int, width: int, patch: int, merge: int, turns: Turns
) -> bool:
    """Resize an RGB image and cut it into `rows`, as `resized` and `fill_rows` do. False: that is left to them."""
    rule, pixels = order_of_passes(), image.width * image.height + width * height
    if turns.threads == 1 or pixels < LEAST_PIXELS or image.size == (width, height) or rule is None:
        return False
    _fill(rows, image, (width, height), patch, merge, turns, rule)
    return True


def _fill(
    rows: NDArray[np.uint8], image: Image.Image, size: Size, patch: int, merge: int, turns: Turns, rule: Rule
) -> None:
    first = 0 if rule(image.size, size) else 1  # the axis along which the first pass goes: x or y
    second, side = 1 - first, patch * merge
    blocks = patch_blocks(rows, size[0], patch, merge)
    halfway = size[first], image.size[second]
    bands = _bands(image.size[second], _count(image.size, turns.threads), 1)
    between: list[Image.Image] = [image] * len(bands)

    def resize_band(nth: int, start: int, stop: int) -> None:
        between[nth] = _along(_part(image, second, start, stop), first, size[first])

    def fill_band(start: int, stop: int) -> None:
        joined = _joined([_part(part, first, start, stop) for part in between], second)
        cut = slice(start // side, stop // side)
        own = blocks[:, cut] if first == 0 else blocks[cut]
        fill_blocks(own, _along(joined, second, size[second]), patch)

    with turns.all_done() as in_turn:
        for nth, band in enumerate(bands):
            in_turn(partial(resize_band, nth, *band))
    with turns.all_done() as in_turn:
        for band in _bands(size[first], _count(halfway, turns.threads), side):
            in_turn(partial(fill_band, *band))


def _count(size: Size, threads: int) -> int:
    return max(threads, -(-size[0] * size[1] // BAND_PIXELS))


def _bands(length: int, count: int, unit: int) -> list[tuple[int, int]]:
    """Divide a length into at most `count` bands of whole units."""
    units = length // unit
    edges = [units * nth // count * unit for nth in range(count + 1)]
    return [(start, stop) for start, stop in pairwise(edges) if start < stop]


def _part(image: Image.Image, axis: int, start: int, stop: int) -> Image.Image:
    return image.crop((start, 0, stop, image.height) if axis == 0 else (0, start, image.width, stop))


def _along(image: Image.Image, axis: int, length: int) -> Image.Image:
    """Resize along one axis alone."""
    return resized(image, image.height, length) if axis == 0 else resized(image, length, image.width)


def _joined(parts: list[Image.Image], axis: int) -> Image.Image:
    length = sum(part.size[axis] for part in parts)
    size = (length, parts[0].height) if axis == 0 else (parts[0].width, length)
    joined, place = Image.new("RGB", size), 0
    for part in parts:
        joined.paste(part, (place, 0) if axis == 0 else (0, place))
        place += part.size[axis]
    return joined


# ------------------------------------------------------------------------------------------------- the order of passes


def _always_rows(before: Size, after: Size) -> bool:
    return True


def _rows_unless_lower(before: Size, after: Size) -> bool:
    lower, narrower = before[1] - after[1], before[0] - after[0]
    return not (lower > 0 and lower > 2 * narrower)


@cache
def order_of_passes() -> Rule | None:
    """Return the rule by which the installed Pillow chooses what comes first; None if it is neither of those known."""
    return next((rule for rule in (_rows_unless_lower, _always_rows) if all(map(rule_holds(rule), _PROBES))), None)


def rule_holds(rule: Rule) -> Callable[[tuple[int, int, int, int]], bool]:
    """Return a test of whether two passes in the order of a rule give the pixels of Pillow's one call."""

    def holds(sizes: tuple[int, int, int, int]) -> bool:
        before, after = (sizes[0], sizes[1]), (sizes[2], sizes[3])
        image = Image.frombytes("RGB", before, np.random.default_rng(0).bytes(3 * before[0] * before[1]))
        order = (0, 1) if rule(before, after) else (1, 0)
        passed = image
        for axis in order:
            passed = _along(passed, axis, after[axis])
        return passed.tobytes() == resized(image, after[1], after[0]).tobytes()

    return holds
