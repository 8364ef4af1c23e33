"""Matrix products with a weight that may be quantised.

Plain weights are the vendor library's business. Quantised ones are dequantised in registers while the product waits for
memory; with so many rows that it waits for arithmetic, they are dequantised once and handed to the library.

With few rows a weight is split along its inputs too, so that all of it is on its way at once. The parts are summed, in
order, by whoever reads the product: a sum in float32 that does not depend on which program was first.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from services.engine.kernels.gpu.dequantize import dequantize
from services.engine.kernels.gpu.launch import overlapped, predecessor
from services.engine.kernels.gpu.matmul import dot_tile
from services.engine.kernels.quantize import GROUP, Quantized, Weight

LIBRARY_ROWS = 1024  # from here on a product is bound by arithmetic


@triton.jit
def _linear_kernel(
    x_ptr, w_ptr, scale_ptr, out_ptr, M, N, IN, share, x_stride, w_stride,
    BITS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    predecessor(PDL)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    first = tl.program_id(2) * share
    rows, columns = (m < M)[None, :], (n < N)[:, None]
    x_ptrs = x_ptr + m.to(tl.int64)[None, :] * x_stride
    w_ptrs = w_ptr + n.to(tl.int64)[:, None] * w_stride
    acc = tl.zeros((BN, BM), tl.float32)
    for k in range(first, tl.minimum(first + share, IN), BK):
        acc = dot_tile(acc, w_ptrs, columns, x_ptrs, rows, k, IN, BK, BITS)
    acc *= tl.load(scale_ptr + n, n < N, 0.0).to(tl.float32)[:, None]
    out_ptrs = out_ptr + (tl.program_id(2).to(tl.int64) * M + m[None, :]) * N + n[:, None]
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), rows & columns)


def linear(x: Tensor, weight: Weight) -> Tensor:
    """See the reference. The rows of `x` may be strided."""
    partial = partial_linear(x, weight)
    return partial[0] if len(partial) == 1 else partial.sum(0).to(x.dtype)


def partial_linear(x: Tensor, weight: Weight) -> Tensor:
    """`linear` in parts that are still to be summed.

    Returns:
        [parts, N, out]: one part in the dtype of x, or several in float32.
    """
    if not isinstance(weight, Quantized):
        return F.linear(x, weight).unsqueeze(0)
    if len(x) >= LIBRARY_ROWS:
        return F.linear(x, dequantize(weight)).unsqueeze(0)
    (rows, inputs), outputs = x.shape, weight.scale.shape[0]
    bm, bn, bk, warps, stages, splits = _tiles(rows, outputs, inputs, weight.bits)
    share = triton.cdiv(triton.cdiv(inputs, bk), splits) * bk
    splits = triton.cdiv(inputs, share)
    dtype = x.dtype if splits == 1 else torch.float32
    out = torch.empty(splits, rows, outputs, dtype=dtype, device=x.device)
    _linear_kernel[(triton.cdiv(outputs, bn), triton.cdiv(rows, bm), splits)](
        x, weight.data, weight.scale, out, rows, outputs, inputs, share, x.stride(0), weight.data.stride(0),
        BITS=weight.bits, BM=bm, BN=bn, BK=bk, num_warps=warps, num_stages=stages, **overlapped(x),
    )  # fmt: skip
    return out


def _tiles(rows: int, outputs: int, inputs: int, bits: int) -> tuple[int, int, int, int, int, int]:
    """BM, BN, BK, warps, stages, splits. Few rows: the weight is the traffic, and many programs put it on its way."""
    if rows > 64:
        return (128, 64, GROUP, 4, 2, 1) if bits == 4 else (64 if rows <= 128 else 128, 64, 128, 4, 4, 1)
    bm = max(16, triton.next_power_of_2(rows))
    splits = max(1, min(inputs // 512, 512 * 32 // outputs))
    return (bm, 32, GROUP, 4, 2, splits) if bits == 4 else (bm, 32, 256, 4, 3 if bm <= 32 else 2, splits)
