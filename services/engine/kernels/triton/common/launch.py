"""Programmatic dependent launch (PDL): a kernel is set up while the one before it still runs.

Such a kernel must not read other kernels' results before `wait_for_previous_kernel` returns, which it does when the
previous kernel has ended; as every kernel of a stream waits in this way, all earlier ones have ended too. A kernel that
joins two streams must not use it. One that needs no result of the previous kernel, but of those before it, may wait at
its end instead: it runs at the same time as the previous one, which has waited at its beginning.
"""

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import driver

HOPPER = (9, 0)
MOST_SHARED_BYTES = 227 << 10  # of a program, on any card


@triton.jit
def wait_for_previous_kernel(PDL: tl.constexpr):
    """Wait until the previous kernel has ended, and let the next one be set up."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def begin_beside_previous_kernel(PDL: tl.constexpr):
    """Let the next kernel be set up, without a wait: this one needs no result of the previous kernel. One of its
    programs ends by `end_after_previous_kernel`."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def end_after_previous_kernel(PDL: tl.constexpr):
    """Wait until the previous kernel has ended, so that who waits for this one has waited for both."""
    if PDL:
        tl.extra.cuda.gdc_wait()


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


@cache
def shared_memory_bytes() -> int:
    """Return the shared memory that a program may have on this process's device: 227 KiB on Hopper, 163 on Ampere's
    large cards, 99 on all others; for the interpreter the most of any."""
    if not torch.cuda.is_available():
        return MOST_SHARED_BYTES
    # As Triton asks before it refuses a kernel.
    return int(driver.active.utils.get_device_properties(torch.cuda.current_device())["max_shared_mem"])


def fitting_stages(stages: int, each: int, rest: int = 0) -> int:
    """Return the stages of a loop's pipeline that the device has shared memory for.

    Args:
        stages: the most that are wanted.
        each: bytes that the loads of an iteration take. Of one stage they are in registers.
        rest: bytes that the kernel takes besides.
    """
    return max(1, min(stages, 1 + (shared_memory_bytes() - rest) // each))
