"""Sampling of a token: the mass of each slice of a row, then one program a row finds the slice and the token in it."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from services.engine.kernels.triton.common.launch import pdl_options, wait_for_previous_kernel
from services.engine.kernels.triton.common.sizes import ceil_div, ceil_pow2

SLICE = 2048  # probabilities of a program, where a row is split


@triton.jit
def masses(probs):
    """Return whole multiples of 2^-60; see the reference."""
    return (probs * 1152921504606846976.0).to(tl.int64)


@triton.jit
def _kept_masses(probs_ptr, least_ptr, row, V, SLICE: tl.constexpr, part):
    """Return [SLICE] int64: masses of the slice's tokens, 0 for those that are not kept."""
    column = part * SLICE + tl.arange(0, SLICE)
    probs = tl.load(probs_ptr + row * V + column, column < V, 0.0)
    return tl.where(probs >= tl.load(least_ptr + row), masses(probs), 0)


@triton.jit
def _slices_kernel(probs_ptr, least_ptr, sums_ptr, V, SLICE: tl.constexpr, PDL: tl.constexpr):
    wait_for_previous_kernel(PDL)
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    kept = _kept_masses(probs_ptr, least_ptr, row, V, SLICE, part)
    tl.store(sums_ptr + row * tl.num_programs(1) + part, tl.sum(kept, 0))


@triton.jit
def _find_kernel(
    probs_ptr, least_ptr, numbers_ptr, sums_ptr, out_ptr, V,
    PARTS: tl.constexpr, BLOCK: tl.constexpr, SLICE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    wait_for_previous_kernel(PDL)
    row = tl.program_id(0).to(tl.int64)
    parts = tl.arange(0, BLOCK)
    sums = tl.load(sums_ptr + row * PARTS + parts, parts < PARTS, 0)
    point = (tl.load(numbers_ptr + row) * tl.sum(sums, 0).to(tl.float64)).to(tl.int64)
    # Slices that end at or before the point do not contain it.
    passed = tl.cumsum(sums, 0) <= point
    part = tl.minimum(tl.sum(passed.to(tl.int32), 0), PARTS - 1)
    point -= tl.sum(tl.where(parts < part, sums, 0), 0)
    within = tl.cumsum(_kept_masses(probs_ptr, least_ptr, row, V, SLICE, part), 0) <= point
    found = part * SLICE + tl.sum(within.to(tl.int32), 0)
    tl.store(out_ptr + row, tl.minimum(found, V - 1).to(tl.int64))


def pick(probs: Tensor, least: Tensor, numbers: Tensor) -> Tensor:
    """See the reference: services.engine.kernels.reference.pick. `probs` contiguous."""
    rows, vocabulary = probs.shape
    parts = ceil_div(vocabulary, SLICE)
    sums = torch.empty(rows, parts, dtype=torch.int64, device=probs.device)
    out = torch.empty(rows, dtype=torch.int64, device=probs.device)
    _slices_kernel[(rows, parts)](probs, least, sums, vocabulary, SLICE=SLICE, num_warps=4, **pdl_options(probs))
    _find_kernel[(rows,)](
        probs, least, numbers, sums, out, vocabulary,
        PARTS=parts, BLOCK=ceil_pow2(parts), SLICE=SLICE, num_warps=4, **pdl_options(probs),
    )  # fmt: skip
    return out
