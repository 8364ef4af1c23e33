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
from services.engine.kernels.gpu.matmul import dot_tile, scales, widen
from services.engine.kernels.quantize import GROUP, Quantized, Weight

LIBRARY_ROWS = 512  # from here on a product is bound by arithmetic
EARLY_ROWS = 32  # up to here a weight is read ahead


@triton.jit
def _linear_kernel(
    x_ptr, w_ptr, scale_ptr, out_ptr, M, N, IN, share, x_stride, w_stride,
    BITS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, EARLY: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    block = tl.program_id(2) * share
    last = tl.minimum(block + share, tl.cdiv(IN, BK))
    rows, columns = (m < M)[None, :], (n < N)[:, None]
    x_ptrs = x_ptr + m.to(tl.int64)[None, :] * x_stride
    w_ptrs = w_ptr + n.to(tl.int64)[:, None] * w_stride
    acc = tl.zeros((BN, BM), tl.float32)
    if EARLY:
        # The weight waits for nobody: with few rows it is on its way before the kernel that makes x has ended.
        column = block * BK + tl.arange(0, BK)
        inside = column < IN
        w = tl.load(w_ptrs + column[None, :], columns & inside[None, :], 0)
        predecessor(PDL)
        x = tl.load(x_ptrs + column[:, None], rows & inside[:, None], 0.0)
        acc = tl.dot(widen(w, x.dtype), x, acc, input_precision="ieee")
        block += 1
    else:
        predecessor(PDL)
    for nth in range(block, last):
        acc = dot_tile(acc, w_ptrs, columns, x_ptrs, rows, nth, IN, BK, BITS, False)
    acc *= scales(scale_ptr + n, n < N)[:, None]
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
    share = -(-inputs // (bk * splits))
    splits = triton.cdiv(inputs, share * bk)
    dtype = x.dtype if splits == 1 else torch.float32
    out = torch.empty(splits, rows, outputs, dtype=dtype, device=x.device)
    _linear_kernel[(triton.cdiv(outputs, bn), triton.cdiv(rows, bm), splits)](
        x, weight.data, weight.scale, out, rows, outputs, inputs, share, x.stride(0), weight.data.stride(0),
        BITS=weight.bits, BM=bm, BN=bn, BK=bk, EARLY=weight.bits == 8 and rows <= EARLY_ROWS,
        num_warps=warps, num_stages=stages if x.element_size() == 2 else 1, **overlapped(x),
    )  # fmt: skip
    return out


def _tiles(rows: int, outputs: int, inputs: int, bits: int) -> tuple[int, int, int, int, int, int]:
    """BM, BN, BK, warps, stages, splits. Few rows: the weight is the traffic, and many programs put it on its way."""
    if bits == 4:
        return min(64, max(16, triton.next_power_of_2(rows))), 32, GROUP, 4, 2, _splits(4, 512 * 32 // outputs)
    if rows <= 16:
        return 16, 32, 512, 4, 3, _splits(triton.cdiv(inputs, 512), 1024 * 32 // outputs)
    if rows <= 32:
        return 32, 32, 256, 4, 3, _splits(5, 12800 // outputs)
    if rows <= 64:
        return 64, 64, 128, 4, 3, _splits(4, 14336 // outputs)
    return 128, 64, 128, 4, 3, _splits(2, 224 // (triton.cdiv(outputs, 64) * triton.cdiv(rows, 128)))


def _splits(most: int, enough: int) -> int:
    return max(1, min(most, enough))
