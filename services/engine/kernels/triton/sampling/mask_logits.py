"""Mask of logits by bits in one launch: a program writes minus infinity in a slice of a row."""

import triton
import triton.language as tl
from torch import Tensor

from services.engine.kernels.triton.common.sizes import ceil_div

BYTES = 512  # of a mask, for a program


@triton.jit
def _mask_kernel(logits_ptr, rows_ptr, masks_ptr, V, STRIDE, BYTES: tl.constexpr):
    guided, place = tl.program_id(0), tl.program_id(1) * BYTES + tl.arange(0, BYTES)
    row = tl.load(rows_ptr + guided)
    bits = tl.load(masks_ptr + guided.to(tl.int64) * STRIDE + place, place < STRIDE, 0).to(tl.int32)
    bit = tl.arange(0, 8)
    column = place[:, None] * 8 + bit[None, :]
    unset = (bits[:, None] >> bit[None, :]) & 1 == 0
    tl.store(logits_ptr + row * V + column, float("-inf"), unset & (column < V))


def mask_logits(logits: Tensor, rows: Tensor, masks: Tensor) -> None:
    """See the reference: services.engine.kernels.reference.mask_logits."""
    guided, stride = masks.shape
    grid = (guided, ceil_div(stride, BYTES))
    _mask_kernel[grid](logits, rows, masks, logits.shape[1], stride, BYTES=BYTES, num_warps=4)
