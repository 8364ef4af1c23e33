"""Greedy sampling in one launch: each program reduces a slice of a row, the last of a row to finish the slices."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from services.engine.kernels.triton.common.last_block import counters, is_last_block
from services.engine.kernels.triton.common.launch import pdl_options, wait_for_previous_kernel
from services.engine.kernels.triton.common.sizes import ceil_div, ceil_pow2

SLICE = 4096  # values of a program


@triton.jit
def _argmax_kernel(
    logits_ptr, values_ptr, places_ptr, count_ptr, out_ptr, V,
    PARTS: tl.constexpr, PADDED: tl.constexpr, SLICE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    wait_for_previous_kernel(PDL)
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    column = part * SLICE + tl.arange(0, SLICE)
    values = tl.load(logits_ptr + row * V + column, column < V, float("-inf"))
    value, place = tl.max(values, 0, return_indices=True)
    tl.store(values_ptr + row * PARTS + part, value)
    tl.store(places_ptr + row * PARTS + part, part * SLICE + place)
    if is_last_block(count_ptr + row, PARTS):
        parts = tl.arange(0, PADDED)
        of_parts = tl.load(values_ptr + row * PARTS + parts, parts < PARTS, float("-inf"), cache_modifier=".cg")
        best = tl.argmax(of_parts, 0)
        found = tl.load(places_ptr + row * PARTS + tl.minimum(best, PARTS - 1), cache_modifier=".cg")
        # Comparisons with NaN may yield an index past the end.
        tl.store(out_ptr + row, tl.minimum(found, V - 1).to(tl.int64))


def argmax(logits: Tensor) -> Tensor:
    """See the reference: services.engine.kernels.reference.argmax."""
    (rows, vocabulary), device = logits.shape, logits.device
    parts = ceil_div(vocabulary, SLICE)
    values = torch.empty(rows, parts, dtype=torch.float32, device=device)
    places = torch.empty(rows, parts, dtype=torch.int32, device=device)
    out = torch.empty(rows, dtype=torch.int64, device=device)
    _argmax_kernel[(rows, parts)](
        logits, values, places, counters(device, "argmax", rows), out, vocabulary,
        PARTS=parts, PADDED=ceil_pow2(parts), SLICE=SLICE, num_warps=4, **pdl_options(logits),
    )  # fmt: skip
    return out
