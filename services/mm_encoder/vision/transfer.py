"""Transfers of a pass: pixels up and embeddings down, through pinned memory, while the host goes on.

Pinned memory is what a GPU copies without waiting; torch keeps it for the next pass. For a CPU nothing is copied that
need not be.
"""

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def stage(rows: Sequence[NDArray[np.uint8]], device: torch.device) -> Tensor:
    """Join the rows of a pass in memory that the device can copy."""
    pinned = device.type == "cuda"
    staged = torch.empty(sum(map(len, rows)), rows[0].shape[1], dtype=torch.uint8, pin_memory=pinned)
    np.concatenate(rows, out=staged.numpy())
    return staged


class Download:
    """A tensor on its way from the device, in the order of the device's work."""

    def __init__(self, tensor: Tensor) -> None:
        self._copied = None
        self._host = tensor
        if tensor.is_cuda:
            self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._host.copy_(tensor, non_blocking=True)
            self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._copied.record()

    def wait(self) -> Tensor:
        """Return the tensor on the host."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._host


class Results:
    """Rows of each of `sizes` items, put together from passes in their order.

    An item that comes whole is not copied. For others ordinary memory is taken once, so that what is pinned is bounded
    by passes and not by items.
    """

    def __init__(self, sizes: Iterable[int]) -> None:
        self._sizes = tuple(sizes)
        self._items: list[Tensor | None] = [None] * len(self._sizes)
        self._filled = [0] * len(self._sizes)

    def add(self, item: int, rows: Tensor) -> None:
        """Add the next rows of an item."""
        first = self._filled[item]
        self._filled[item] += len(rows)
        if len(rows) == self._sizes[item]:
            self._items[item] = rows
            return
        whole = self._items[item]
        if whole is None:
            whole = self._items[item] = rows.new_empty(self._sizes[item], *rows.shape[1:], device="cpu")
        whole[first : first + len(rows)] = rows

    def whole(self) -> list[Tensor]:
        """Return all items."""
        assert self._filled == list(self._sizes)
        return [item for item in self._items if item is not None]
