"""Patches of pixels for the vision tower: uint8 rows of one patch each."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


Grid = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class Patches:
    """Patches of one image or video."""

    rows: NDArray[np.uint8]  # [t * h * w, channels * patch * patch]
    grid: Grid  # frames, patch rows, patch columns


def patch_rows(pixels: NDArray[np.uint8], patch: int, merge: int) -> NDArray[np.uint8]:
    """Cut one frame into rows: [H, W, C] to [H/patch * W/patch, C * patch * patch]."""
    height, width, channels = pixels.shape
    rows = np.empty((height // patch * (width // patch), channels * patch * patch), np.uint8)
    fill_rows(rows, pixels, patch, merge)
    return rows


def fill_rows(rows: NDArray[np.uint8], pixels: NDArray[np.uint8], patch: int, merge: int) -> None:
    """Cut one frame into `rows`, which are contiguous and of the shape that `patch_rows` returns.

    Rows go block row, block column, row in block, column in block, a block being `merge` x `merge` patches, so that
    the patches of one token are neighbours; inside a row: channel, y, x.
    """
    height, width, channels = pixels.shape
    tall, wide = height // patch, width // patch
    blocks = pixels.reshape(tall // merge, merge, patch, wide // merge, merge, patch, channels)
    ordered = blocks.transpose(0, 3, 1, 4, 6, 2, 5)
    rows.reshape(ordered.shape)[...] = ordered
