"""Upload of many small arrays to the device in one copy that nothing waits for."""

from collections.abc import Sequence
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_ALIGNMENT = 16  # kernels are compiled once more for addresses that are not multiples of it


def upload(arrays: Sequence[NDArray[np.generic]], device: torch.device) -> list[Tensor]:
    """Return the arrays as tensors over one allocation.

    The copy is from pinned memory, so that the host continues while the device still computes; torch does not reuse
    that memory before the copy has been made.
    """
    if not arrays:
        return []
    starts = np.cumsum([0, *(-(-array.nbytes // _ALIGNMENT) * _ALIGNMENT for array in arrays)]).tolist()
    host = torch.empty(starts[-1], dtype=torch.uint8, pin_memory=device.type == "cuda")
    room = host.numpy()
    for array, start in zip(arrays, starts, strict=False):
        room[start : start + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    moved = host.to(device, non_blocking=True)
    return [
        moved[start : start + array.nbytes].view(_dtype(array.dtype)).view(array.shape)
        for array, start in zip(arrays, starts, strict=False)
    ]


@cache
def _dtype(dtype: "np.dtype[np.generic]") -> torch.dtype:
    return torch.from_numpy(np.empty(0, dtype)).dtype
