"""Normalisation of patches on the device: pixels go up as bytes."""

import torch
from torch import Tensor


def normalise(rows: Tensor, mean: Tensor, std: Tensor, dtype: torch.dtype) -> Tensor:
    """Return `(x / 255 - mean) / std` per channel, in fp32 and rounded once to the model's dtype, as in FastDeploy.

    `rows` is [N, C * patch * patch] uint8; `mean` and `std` are [C] float32 on the same device.
    """
    channels = rows.reshape(rows.shape[0], mean.shape[0], -1).float() * (1 / 255)
    normal: Tensor = (channels - mean[:, None]) / std[:, None]
    return normal.flatten(1).to(dtype)
