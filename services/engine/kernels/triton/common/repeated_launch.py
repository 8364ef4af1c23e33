"""Launches of one kernel again and again, with arguments of which a few change.

Triton looks at all arguments of a launch to find the kernel that was compiled for their kinds, which is most of what a
launch takes the host. Here the first launch finds it, and the others, of further layers, use it.
"""

from typing import Any

from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

ALIGNMENT = 16  # bytes: what Triton compiles for, and what tensors that take each other's place must be multiples of


class RepeatedLaunch:
    """Launch of a kernel on the current stream."""

    def __init__(self, kernel: Any, grid: tuple[int, ...], **keywords: Any) -> None:
        """`keywords`: as of any launch, but for the tensors that change."""
        self._kernel = kernel
        self._grid = (*grid, 1, 1)[:3]
        self._arguments = {name: keywords.pop(name, None) for name in kernel.arg_names}
        self._options = keywords  # of the compiler
        self._compiled: Any = None

    def __call__(self, **changing: Tensor | TensorDescriptor) -> None:
        """Launch, with tensors of the same kinds each time."""
        self._arguments.update(changing)
        aligned = all(_address(tensor) % ALIGNMENT == 0 for tensor in changing.values())
        if self._compiled is not None and aligned:
            self._compiled[self._grid](*self._arguments.values())
            return
        compiled = self._kernel[self._grid](**self._arguments, **self._options)
        if aligned:
            self._compiled = compiled  # None from the interpreter


def _address(tensor: Tensor | TensorDescriptor) -> int:
    address: int = (tensor.base if isinstance(tensor, TensorDescriptor) else tensor).data_ptr()
    return address
