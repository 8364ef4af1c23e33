"""A quantised weight back in the dtype of the activations, for products that are bound by arithmetic."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from services.engine.kernels.gpu.launch import overlapped, predecessor
from services.engine.kernels.gpu.matmul import scales, unpack, widen
from services.engine.kernels.quantize import GROUP, PLANES, Quantized

ROWS = 16  # of a program


@triton.jit
def _dequantize_kernel(
    data_ptr, scale_ptr, out_ptr, ROWS_ALL, IN, data_stride,
    BITS: tl.constexpr, ROWS: tl.constexpr, GROUP: tl.constexpr, PLANES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    predecessor(PDL)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    rows = (row < ROWS_ALL)[:, None]
    scale = scales(scale_ptr + row, row < ROWS_ALL)[:, None]
    dtype = out_ptr.dtype.element_ty
    data_ptrs, out_ptrs = data_ptr + row[:, None] * data_stride, out_ptr + row[:, None] * IN
    for first in range(0, IN, GROUP):
        if BITS == 4:
            lane = tl.arange(0, GROUP // PLANES)
            planes = unpack(tl.load(data_ptrs + (first // PLANES + lane)[None, :], rows, 0), dtype)
            for j in tl.static_range(PLANES):
                column = first + j * (GROUP // PLANES) + lane
                value = (planes[j].to(tl.float32) * scale).to(dtype)
                tl.store(out_ptrs + column[None, :], value, rows & (column < IN)[None, :])
        else:
            column = first + tl.arange(0, GROUP)
            mask = rows & (column < IN)[None, :]
            values = widen(tl.load(data_ptrs + column[None, :], mask, 0), dtype)
            tl.store(out_ptrs + column[None, :], (values.to(tl.float32) * scale).to(dtype), mask)


def dequantize(weight: Quantized) -> Tensor:
    """See the reference: services.engine.kernels.quantize.dequantize."""
    shape, rows = weight.scale.shape, weight.scale.numel()
    out = torch.empty(*shape, weight.in_features, dtype=weight.scale.dtype, device=weight.data.device)
    _dequantize_kernel[(triton.cdiv(rows, ROWS),)](
        weight.data, weight.scale, out, rows, weight.in_features, weight.data.stride(-2),
        BITS=weight.bits, ROWS=ROWS, GROUP=GROUP, PLANES=PLANES, num_warps=4, **overlapped(out),
    )  # fmt: skip
    return out
