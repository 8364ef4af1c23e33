"""Last-block reduction: each program stores a partial result, and the last one to finish, by an atomic counter,
combines them all, which saves a launch.

Which program is last varies, so nothing that depends on an order may depend on it: parts are left in memory, and
whichever program finds all of them there sums them in their own order.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from services.engine.kernels.triton.common.sizes import ceil_pow2


@triton.jit
def is_last_block(count_ptr, programs):
    """Return True in the last of `programs` to call this; it may then read the others' earlier stores, past the first
    level of the cache. The count is 0 before the first call and after the last."""
    # One thread counts for the program: the barrier orders all its stores before, and its reads after.
    tl.debug_barrier()
    last = tl.atomic_add(count_ptr, 1, sem="acq_rel") == programs - 1
    if last:
        tl.store(count_ptr, 0)
    return last


def counters(device: torch.device, owner: str, count: int) -> Tensor:
    """Return at least `count` int32 zeros that belong to the launches of one kernel, which leave them zero. These
    launches follow each other on one stream; graphs keep the address."""
    return _zeros(device, owner, max(1024, ceil_pow2(count)))


@cache
def _zeros(device: torch.device, owner: str, size: int) -> Tensor:
    return torch.zeros(size, dtype=torch.int32, device=device)
