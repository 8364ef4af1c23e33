"""Quantisation to four bits: every scale that a group may take is tried while its weights are in registers."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from services.engine.kernels import quantize as reference
from services.engine.kernels.quantize import (
    BIAS,
    BLOCK,
    CANDIDATES,
    GROUP,
    HIGHEST,
    LOWEST,
    SHIFT,
    TOP,
    Bits,
    Quantized,
)
from services.engine.kernels.triton.common.sizes import ceil_div

ROWS, WARPS = 4, 4  # of a program's tile, which is as wide as a block of the packing

_BIAS, _SHIFT = tl.constexpr(BIAS), tl.constexpr(SHIFT)
_LOWEST, _HIGHEST, _TOP = tl.constexpr(LOWEST), tl.constexpr(HIGHEST), tl.constexpr(TOP)
# Added to a float32 and taken away again, it leaves an integer: the nearest, of two the even one.
_ROUND = tl.constexpr(12582912.0)


@triton.jit
def _nearest(x, scale):
    """Return the values of x [.., PLANES, GROUP] with scales [.., PLANES]."""
    rounded = x / scale[:, :, None] + _ROUND - _ROUND
    return tl.minimum(tl.maximum(rounded, _LOWEST), _HIGHEST)


@triton.jit
def _group_scale(code):
    return ((code + _BIAS) << _SHIFT).to(tl.float32, bitcast=True)


@triton.jit
def _quantize_kernel(
    x_ptr, data_ptr, scale_ptr, group_ptr, OUT, EACH, IN, x_stride,
    CANDIDATES: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Quantise rows of a stack of weights with EACH rows each, OUT in all."""
    PLANES: tl.constexpr = BLOCK // GROUP
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = (row < OUT)[:, None, None]
    plane, lane = tl.arange(0, PLANES), tl.arange(0, GROUP)
    column = plane[None, :, None] * GROUP + lane[None, None, :]
    x_ptrs = x_ptr + row.to(tl.int64)[:, None, None] * x_stride + column
    largest = tl.zeros((ROWS,), tl.float32)
    for first in range(0, IN, BLOCK):
        x = tl.load(x_ptrs + first, inside & (first + column < IN), 0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.max(tl.max(tl.abs(x), 2), 1))
    row_scale = (largest / (_HIGHEST * _TOP)).to(scale_ptr.dtype.element_ty)
    tl.store(scale_ptr + row, row_scale, row < OUT)
    unit = tl.where(row_scale > 0, row_scale.to(tl.float32), 1.0)[:, None]
    blocks = tl.cdiv(IN, BLOCK)
    for block in range(0, blocks):
        first = block * BLOCK
        x = tl.load(x_ptrs + first, inside & (first + column < IN), 0.0).to(tl.float32)
        amax = tl.max(tl.abs(x), 2)
        highest = ((amax / (_HIGHEST * unit)).to(tl.int32, bitcast=True) >> _SHIFT) - _BIAS + 1
        best = tl.zeros((ROWS, PLANES), tl.int32)
        least = tl.full((ROWS, PLANES), float("inf"), tl.float32)
        for below in range(0, CANDIDATES):
            code = tl.minimum(tl.maximum(highest - below, 0), 255)
            scale = _group_scale(code) * unit
            wrong = _nearest(x, scale) * scale[:, :, None] - x
            error = tl.sum(wrong * wrong, 2)
            best = tl.where(error < least, code, best)
            least = tl.minimum(error, least)
        nibbles = _nearest(x, _group_scale(best) * unit).to(tl.int32) & 0xF
        words = tl.sum(nibbles << (4 * plane)[None, :, None], 1).to(tl.int16)
        at = row.to(tl.int64)[:, None] * (blocks * GROUP) + block * GROUP + lane[None, :]
        tl.store(data_ptr + at, words, (row < OUT)[:, None])
        group = (row // EACH * blocks + block).to(tl.int64) * EACH + row % EACH
        tl.store(group_ptr + group, tl.sum(best << (8 * plane)[None, :], 1), row < OUT)


def quantize(weight: Tensor, bits: Bits) -> Quantized:
    """See the reference: services.engine.kernels.quantize. Divisions are not rounded alike, so that in a tie another
    value or scale may be taken."""
    if bits == 8 or weight.is_meta:
        return reference.quantize(weight, bits)
    weight = weight.contiguous()
    *stack, each, inputs = weight.shape
    outputs, blocks, device = weight.numel() // inputs, ceil_div(inputs, BLOCK), weight.device
    data = torch.empty(*stack, each, blocks * GROUP, dtype=torch.int16, device=device)
    scale = torch.empty(*stack, each, dtype=weight.dtype, device=device)
    groups = torch.empty(*stack, blocks, each, dtype=torch.int32, device=device)
    _quantize_kernel[(ceil_div(outputs, ROWS),)](
        weight, data, scale, groups, outputs, each, inputs, inputs,
        CANDIDATES=CANDIDATES, ROWS=ROWS, BLOCK=BLOCK, GROUP=GROUP, num_warps=WARPS,
    )  # fmt: skip
    return Quantized(data, scale, 4, inputs, groups)
