"""Patches of pixels for the vision tower: uint8 rows of one patch each."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
_BAND_BYTES = 1 << 20


Grid = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class Patches:
    """Patches of one image or video."""

    rows: NDArray[np.uint8]  # [t * h * w, channels * patch * patch]
    grid: Grid  # frames, patch rows, patch columns


def patch_rows(pixels: NDArray[np.uint8], patch: int, merge: int) -> NDArray[np.uint8]:
    """Cut one frame into rows: [H, W, C] to [H/patch * W/patch, C * patch * patch].

    Rows go block row, block column, row in block, column in block, a block being `merge` x `merge` patches, so that
    the patches of one token are neighbours; inside a row: channel, y, x.
    """
    height, width, channels = pixels.shape
    tall, wide = height // patch, width // patch
    blocks = pixels.reshape(tall // merge, merge, patch, wide // merge, merge, patch, channels)
    return blocks.transpose(0, 3, 1, 4, 6, 2, 5).reshape(tall * wide, -1)


def fill_rows(rows: NDArray[np.uint8], image: Image.Image, patch: int, merge: int) -> None:
    """Cut an RGB image into `rows`, contiguous, as `patch_rows` does with its pixels."""
    fill_blocks(patch_blocks(rows, image.width, patch, merge), image, patch)


def patch_blocks(rows: NDArray[np.uint8], width: int, patch: int, merge: int) -> NDArray[np.void]:
    """Return the rows of an image as [block row, block column, y, x, channel, line] of lines of patches."""
    line = np.dtype(f"V{patch}")
    return rows.view(line).reshape(-1, width // (merge * patch), merge, merge, 3, patch)


def fill_blocks(blocks: NDArray[np.void], image: Image.Image, patch: int) -> None:
    """Cut an RGB image, or the part of one that these blocks are of.

    Band by band, in the processor's cache, and channel by channel: Pillow writes the pixels of one behind each other,
    of which the lines of patches are copied, `patch` bytes at a time.
    """
    wide, merge = blocks.shape[1:3]
    side = merge * patch
    at_once = max(1, _BAND_BYTES // (4 * image.width * side))
    for first in range(0, len(blocks), at_once):
        some = blocks[first : first + at_once]
        height = len(some) * side
        whole = height == image.height
        band = image if whole else image.crop((0, first * side, image.width, first * side + height))
        for place, channel in enumerate("RGB"):
            pixels = np.frombuffer(band.tobytes("raw", channel), blocks.dtype)
            lines = pixels.reshape(len(some), merge, patch, wide, merge)
            some[:, :, :, :, place] = lines.transpose(0, 3, 1, 4, 2)
