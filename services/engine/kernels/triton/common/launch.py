"""Launches that overlap: a kernel is set up while the one before it still runs (programmatic dependent launch).

A kernel launched so must not read what others wrote before `predecessor` returns. It returns when the kernel before has
ended; as every kernel of a stream waits in this way, all earlier ones have ended too. Not for a kernel that joins two
streams.
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
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


def pdl_options(tensor: Tensor) -> dict[str, Any]:
    """Launch options for the device that holds `tensor`."""
    return _options(tensor.device)


@cache
def _options(device: torch.device) -> dict[str, Any]:
    able = device.type == "cuda" and torch.cuda.get_device_capability(device) >= HOPPER
    return {"PDL": able, "launch_pdl": able}


@cache
def multiprocessors(device: torch.device) -> int:
    """An interpreter has some, too: more than one, so that tiles are shared out."""
    if device.type != "cuda":
        return 3
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
