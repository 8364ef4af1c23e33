"""Copies of tensors to the host, queued behind the device's work and waited for when they are read."""

from collections.abc import Sequence
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor


class Download:
    """Tensors on their way to the host; those on the host already are not copied."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        # torch puts the result of such a copy into pinned memory; into other memory it would wait here.
        self._host = [tensor.to("cpu", non_blocking=True) for tensor in tensors]
        self._copied: torch.cuda.Event | None = None
        if tensors and tensors[0].is_cuda:
            self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._copied.record()

    def read(self) -> list[NDArray[Any]]:
        """Return the tensors' values; waits for them, and for nothing that was launched later."""
        if self._copied is not None:
            self._copied.synchronize()
        return [tensor.numpy() for tensor in self._host]
