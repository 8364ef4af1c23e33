"""Threshold of top_k and top_p without a sort: a tally over a few powers of two brackets it, then one program a row
collects the values in the bracket and bisects.

At most 2^e tokens have a probability of 2^-e or more, so likely tokens are few: the powers begin at 2^-10, and the list
of a distribution that is worth cutting is short. Counts and masses are integers, so the result is exact (see the
reference), however a row is split.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from services.engine.kernels.triton.common.launch import pdl_options, wait_for_previous_kernel
from services.engine.kernels.triton.common.sizes import ceil_div, ceil_pow2
from services.engine.kernels.triton.sampling.pick import SLICE, masses

PIVOTS = 9  # 2^-10 to 2^-18
SEARCHED = 4096  # probabilities that a searching program reads at a time


@triton.jit
def _pivot(nth):
    """Return the bits of 2^-(10 + nth). Of floats that are not negative, the larger has the larger bits."""
    return (117 - nth) << 23


@triton.jit
def _measure(bits, MASS: tl.constexpr):
    """Return the measure of each probability: 2^60 times itself, or one."""
    return masses(bits.to(tl.float32, bitcast=True)) if MASS else tl.full(bits.shape, 1, tl.int64)


@triton.jit
def _tally_kernel(
    bits_ptr, top_k_ptr, top_p_ptr, tally_ptr, V, PIVOTS: tl.constexpr, SLICE: tl.constexpr, PDL: tl.constexpr
):  # fmt: skip
    wait_for_previous_kernel(PDL)
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if (tl.load(top_k_ptr + row) > 0) | (tl.load(top_p_ptr + row) < 1):
        column = part * SLICE + tl.arange(0, SLICE)
        bits = tl.load(bits_ptr + row * V + column, column < V, 0)
        mass = _measure(bits, True)
        parts = tl.num_programs(1)
        at = tally_ptr + row * 2 * PIVOTS * parts + part
        for nth in range(PIVOTS):
            above = bits >= _pivot(nth)
            tl.store(at + nth * parts, tl.sum(above.to(tl.int64), 0))
            tl.store(at + (PIVOTS + nth) * parts, tl.sum(tl.where(above, mass, 0), 0))


@triton.jit
def _part(bits_ptr, count, value, MASS: tl.constexpr, BLOCK: tl.constexpr):
    """Partition `count` probabilities, as bits, at a value: return the number or mass above it, the least of those
    above, and the largest of the others (0: none)."""
    total = tl.zeros((BLOCK,), tl.int64)
    least = tl.full((BLOCK,), 0x7FFFFFFF, tl.int32)
    largest = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, count, BLOCK):
        at = start + tl.arange(0, BLOCK)
        bits = tl.load(bits_ptr + at, at < count, 0)
        above = bits > value
        total += tl.where(above, _measure(bits, MASS), 0)
        least = tl.minimum(least, tl.where(above, bits, 0x7FFFFFFF))
        largest = tl.maximum(largest, tl.where(above, 0, bits))
    return tl.sum(total, 0), tl.min(least, 0), tl.max(largest, 0)


@triton.jit
def _search(
    bits_ptr, list_ptr, tally_ptr, limit, V,
    MASS: tl.constexpr, PARTS: tl.constexpr, PADDED: tl.constexpr, PIVOTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Return the smallest bits above which less than `limit` lies, by number or by mass."""
    part = tl.arange(0, PADDED)
    low, high, beyond = 0, 0x3F800000, limit * 0
    tally_ptr += (PIVOTS if MASS else 0) * PARTS
    for nth in range(PIVOTS):
        measured = tl.sum(tl.load(tally_ptr + nth * PARTS + part, part < PARTS, 0), 0)
        fewer = measured < limit
        # The pivots descend: the last that has fewer above it, and the first that has not, are the bracket.
        low = tl.where(fewer, low, tl.maximum(low, _pivot(nth)))
        high = tl.where(fewer, _pivot(nth) - 1, high)
        beyond = tl.where(fewer, measured, beyond)
    count = 0
    for start in range(0, V, BLOCK):
        at = start + tl.arange(0, BLOCK)
        bits = tl.load(bits_ptr + at, at < V, 0)
        inside = ((bits > low) & (bits <= high)).to(tl.int32)
        tl.store(list_ptr + count + tl.cumsum(inside, 0) - 1, bits, inside != 0)
        count += tl.sum(inside, 0)
    # Other threads read the list than wrote it.
    tl.debug_barrier()
    while low < high:
        middle = (low + high) // 2
        listed, above, below = _part(list_ptr, count, middle, MASS, BLOCK)
        fewer = beyond + listed < limit
        # Move to the next value that occurs: equals, however many, take one halving.
        low = tl.where(fewer, low, tl.minimum(above, high))
        high = tl.where(fewer, tl.maximum(below, low), high)
    return low


@triton.jit
def _threshold_kernel(
    bits_ptr, floor_ptr, top_k_ptr, top_p_ptr, tally_ptr, list_ptr, out_ptr, V,
    PARTS: tl.constexpr, PADDED: tl.constexpr, PIVOTS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    wait_for_previous_kernel(PDL)
    row = tl.program_id(0).to(tl.int64)
    bits_ptr += row * V
    list_ptr += row * V
    tally_ptr += row * 2 * PIVOTS * PARTS
    least = tl.load(floor_ptr + row)
    top_k, top_p = tl.load(top_k_ptr + row), tl.load(top_p_ptr + row)
    if top_k > 0:
        found = _search(bits_ptr, list_ptr, tally_ptr, top_k, V, False, PARTS, PADDED, PIVOTS, BLOCK)
        least = tl.maximum(least, found)
    if top_p < 1:
        share = tl.full((), 1 << 60, tl.int64)
        if top_k > 0:
            share, _, _ = _part(bits_ptr, V, least - 1, True, BLOCK)
        limit = tl.ceil(top_p * share.to(tl.float64)).to(tl.int64)
        found = _search(bits_ptr, list_ptr, tally_ptr, limit, V, True, PARTS, PADDED, PIVOTS, BLOCK)
        least = tl.maximum(least, found)
    tl.store(out_ptr + row, least)


def threshold(probs: Tensor, floor: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """See the reference: services.engine.kernels.reference.threshold. Everything contiguous."""
    rows, vocabulary = probs.shape
    parts = ceil_div(vocabulary, SLICE)
    bits, device = probs.view(torch.int32), probs.device
    tally = torch.empty(rows, 2, PIVOTS, parts, dtype=torch.int64, device=device)
    listed, out = torch.empty_like(bits), torch.empty(rows, dtype=torch.int32, device=device)
    _tally_kernel[(rows, parts)](
        bits, top_k, top_p, tally, vocabulary, PIVOTS=PIVOTS, SLICE=SLICE, num_warps=4, **pdl_options(probs)
    )  # fmt: skip
    _threshold_kernel[(rows,)](
        bits, floor.view(torch.int32), top_k, top_p, tally, listed, out, vocabulary,
        PARTS=parts, PADDED=ceil_pow2(parts), PIVOTS=PIVOTS, BLOCK=SEARCHED, num_warps=8,
        **pdl_options(probs),
    )  # fmt: skip
    return out.view(torch.float32)
