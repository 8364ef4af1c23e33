"""A quantised weight back in the dtype of the activations, for products that are bound by arithmetic."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from services.engine.kernels.gpu.launch import overlapped, predecessor
from services.engine.kernels.gpu.matmul import unpack, widen
from services.engine.kernels.quantize import GROUP, PLANES, Quantized

ROWS = 16


@triton.jit
def _dequantize_kernel(
    data_ptr, scale_ptr, out_ptr, ROWS_ALL, IN, data_stride,
    BITS: tl.constexpr, ROWS: tl.constexpr, GROUP: tl.constexpr, PLANES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    predecessor(PDL)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    first = tl.program_id(1) * GROUP
    rows = (row < ROWS_ALL)[:, None]
    scale = tl.load(scale_ptr + row, row < ROWS_ALL, 0.0).to(tl.float32)[:, None]
    dtype = out_ptr.dtype.element_ty
    if BITS == 4:
        lane = tl.arange(0, GROUP // PLANES)
        words = tl.load(data_ptr + row[:, None] * data_stride + first // PLANES + lane[None, :], rows, 0)
        planes = unpack(words, dtype)
        for j in tl.static_range(PLANES):
            column = first + j * (GROUP // PLANES) + lane
            value = (planes[j].to(tl.float32) * scale).to(dtype)
            tl.store(out_ptr + row[:, None] * IN + column[None, :], value, rows & (column < IN)[None, :])
    else:
        column = first + tl.arange(0, GROUP)
        mask = rows & (column < IN)[None, :]
        values = widen(tl.load(data_ptr + row[:, None] * data_stride + column[None, :], mask, 0), dtype)
        tl.store(out_ptr + row[:, None] * IN + column[None, :], (values.to(tl.float32) * scale).to(dtype), mask)


def dequantize(weight: Quantized) -> Tensor:
    """See the reference: services.engine.kernels.quantize.dequantize."""
    shape, rows = weight.scale.shape, weight.scale.numel()
    out = torch.empty(*shape, weight.in_features, dtype=weight.scale.dtype, device=weight.data.device)
    _dequantize_kernel[(triton.cdiv(rows, ROWS), triton.cdiv(weight.in_features, GROUP))](
        weight.data, weight.scale, out, rows, weight.in_features, weight.data.stride(-2),
        BITS=weight.bits, ROWS=ROWS, GROUP=GROUP, PLANES=PLANES, num_warps=4, **overlapped(out),
    )  # fmt: skip
    return out
