"""Tensors to the host in copies that are queued behind the device's work, and are waited for where they are read."""

from collections.abc import Sequence
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor


class Download:
    """Tensors on their way to the host. On the host already, they are not copied."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        # torch puts such a copy into pinned memory; else it would be waited for here.
        self._host = [tensor.to("cpu", non_blocking=True) for tensor in tensors]
        self._copied: torch.cuda.Event | None = None
        if tensors and tensors[0].is_cuda:
            self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._copied.record()

    def read(self) -> list[NDArray[Any]]:
        """The tensors' values; waits for them, and for nothing that was launched later."""
        if self._copied is not None:
            self._copied.synchronize()
        return [tensor.numpy() for tensor in self._host]
