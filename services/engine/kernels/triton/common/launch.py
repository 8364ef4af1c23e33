"""Programmatic dependent launch (PDL): a kernel is set up while the one before it still runs.

Such a kernel must not read other kernels' results before `wait_for_previous_kernel` returns, which it does when the
previous kernel has ended; as every kernel of a stream waits in this way, all earlier ones have ended too. A kernel that
joins two streams must not use it.
"""

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

HOPPER = (9, 0)


@triton.jit
def wait_for_previous_kernel(PDL: tl.constexpr):
    """Wait until the previous kernel has ended, and let the next one be set up."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


def pdl_options(tensor: Tensor) -> dict[str, Any]:
    """Return the launch options for the device that holds `tensor`."""
    return _options(tensor.device)


@cache
def _options(device: torch.device) -> dict[str, Any]:
    able = device.type == "cuda" and torch.cuda.get_device_capability(device) >= HOPPER
    return {"PDL": able, "launch_pdl": able}


@cache
def multiprocessors(device: torch.device) -> int:
    """Return the device's multiprocessors; for the interpreter more than one, so that programs share tiles."""
    if device.type != "cuda":
        return 3
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
