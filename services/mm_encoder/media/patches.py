"""Patches of pixels for the vision tower: uint8 rows of one patch each, and their normalisation on the device."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


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
    return blocks.transpose(0, 3, 1, 4, 6, 2, 5).reshape(tall * wide, channels * patch * patch)


def normalise(rows: Tensor, mean: Tensor, std: Tensor, dtype: torch.dtype) -> Tensor:
    """Return `(x / 255 - mean) / std` per channel, in fp32 and rounded once to the model's dtype, as in FastDeploy.

    `rows` is [N, C * patch * patch] uint8; `mean` and `std` are [C] float32 on the same device.
    """
    channels = rows.reshape(rows.shape[0], mean.shape[0], -1).float() * (1 / 255)
    normal: Tensor = (channels - mean[:, None]) / std[:, None]
    return normal.flatten(1).to(dtype)
