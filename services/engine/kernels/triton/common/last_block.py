"""What several programs of a launch prepare and the last of them to come completes: a launch less.

Who is last is not known beforehand, so whatever depends on an order must not depend on it: parts are left in memory and
summed in their own order, by whichever program finds all of them there.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from services.engine.kernels.triton.common.sizes import ceil_pow2


@triton.jit
def last_of(count_ptr, programs):
    """Whether this program is the last of so many to come here; if so, it may read what the others stored before they
    came, past the first level of the cache. The count is 0 before the first and after the last."""
    # One thread counts, for all: their stores come before, and those who read come after.
    tl.debug_barrier()
    last = tl.atomic_add(count_ptr, 1, sem="acq_rel") == programs - 1
    if last:
        tl.store(count_ptr, 0)
    return last


def counters(device: torch.device, owner: str, count: int) -> Tensor:
    """At least `count` int32 zeros that belong to the launches of one kernel, which leave them so. These follow each
    other on one stream; graphs keep the address."""
    return _zeros(device, owner, max(1024, ceil_pow2(count)))


@cache
def _zeros(device: torch.device, owner: str, size: int) -> Tensor:
    return torch.zeros(size, dtype=torch.int32, device=device)
