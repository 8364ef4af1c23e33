"""Matrix products with a weight that may be quantised.

Plain weights are the vendor library's business. Quantised ones are dequantised in registers while the product waits for
memory; with so many rows that it waits for arithmetic, they are dequantised once and handed to the library, which may
have been done when they were loaded.

With few rows a weight is split along its inputs too, so that all of it is on its way at once. The parts are summed, in
order, by whoever reads the product: a sum in float32 that does not depend on which program was first.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from services.engine.kernels.gpu.dequantize import plain
from services.engine.kernels.gpu.launch import overlapped, predecessor
from services.engine.kernels.gpu.matmul import dot_tile, scales, widen
from services.engine.kernels.quantize import GROUP, Quantized, Weight

LIBRARY_ROWS = 512  # from here on a product is bound by arithmetic
PLAIN_ROWS = 96  # from here on the library is faster, where it need not wait for a weight to be dequantised
EARLY_ROWS = 32  # up to here a weight is read ahead


@triton.jit
def product(
    x_ptr, w_ptr, scale_ptr, m, n, M, N, IN, share, x_stride, w_stride,
    BITS: tl.constexpr, BK: tl.constexpr, EARLY: tl.constexpr, EVEN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """weight[n] times x[m]^T over part program_id(2) of the inputs, which are `share` blocks of BK: [BN, BM] float32.

    Waits for the predecessor.
    """
    block = tl.program_id(2) * share
    last = tl.minimum(block + share, tl.cdiv(IN, BK))
    rows, columns = (m < M)[None, :], (n < N)[:, None]
    x_ptrs = x_ptr + m.to(tl.int64)[None, :] * x_stride
    w_ptrs = w_ptr + n.to(tl.int64)[:, None] * w_stride
    acc = tl.zeros((n.shape[0], m.shape[0]), tl.float32)
    # The weight waits for nobody: with few rows it is on its way before the kernel that makes x has ended.
    scale = scales(scale_ptr + n, n < N)[:, None]
    if EARLY:
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
        acc = dot_tile(acc, w_ptrs, columns, x_ptrs, rows, nth, IN, BK, BITS, EVEN)
    return acc * scale


@triton.jit
def _linear_kernel(
    x_ptr, w_ptr, scale_ptr, out_ptr, M, N, IN, share, x_stride, w_stride,
    BITS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    EARLY: tl.constexpr, EVEN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    acc = product(x_ptr, w_ptr, scale_ptr, m, n, M, N, IN, share, x_stride, w_stride, BITS, BK, EARLY, EVEN, PDL)
    out_ptrs = out_ptr + (tl.program_id(2).to(tl.int64) * M + m[None, :]) * N + n[:, None]
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), (m < M)[None, :] & (n < N)[:, None])


@dataclass(frozen=True, slots=True)
class Cut:
    """How a product is launched."""

    grid: tuple[int, int, int]  # tiles of outputs, tiles of rows, parts of the inputs
    arguments: tuple[Tensor, Tensor, Tensor]  # x, weight, scales
    sizes: tuple[int, ...]  # M to w_stride
    options: dict[str, Any]


def cut(x: Tensor, weight: Weight) -> Cut | None:
    """None if the product is the library's business."""
    if not isinstance(weight, Quantized) or len(x) >= (LIBRARY_ROWS if weight.plain is None else PLAIN_ROWS):
        return None
    (rows, inputs), outputs = x.shape, weight.scale.shape[0]
    bm, bn, bk, warps, stages, splits = _tiles(rows, outputs, weight.bits)
    share = -(-inputs // (bk * splits))
    options = {
        "BITS": weight.bits, "BM": bm, "BN": bn, "BK": bk,
        "EARLY": weight.bits == 8 and rows <= EARLY_ROWS, "EVEN": inputs % bk == 0 and outputs % bn == 0,
        "num_warps": warps, "num_stages": stages if x.element_size() == 2 else 1, **overlapped(x),
    }  # fmt: skip
    return Cut(
        (triton.cdiv(outputs, bn), triton.cdiv(rows, bm), triton.cdiv(inputs, share * bk)),
        (x, weight.data, weight.scale),
        (rows, outputs, inputs, share, x.stride(0), weight.data.stride(0)),
        options,
    )


def linear(x: Tensor, weight: Weight) -> Tensor:
    """See the reference. The rows of `x` may be strided."""
    partial = partial_linear(x, weight)
    return partial[0] if len(partial) == 1 else partial.sum(0).to(x.dtype)


def partial_linear(x: Tensor, weight: Weight) -> Tensor:
    """`linear` in parts that are still to be summed.

    Returns:
        [parts, N, out]: one part in the dtype of x, or several in float32.
    """
    way = cut(x, weight)
    if way is None:
        return F.linear(x, plain(weight)).unsqueeze(0)
    splits = way.grid[2]
    dtype = x.dtype if splits == 1 else torch.float32
    out = torch.empty(splits, len(x), way.sizes[1], dtype=dtype, device=x.device)
    _linear_kernel[way.grid](*way.arguments, out, *way.sizes, **way.options)
    return out


def _tiles(rows: int, outputs: int, bits: int) -> tuple[int, int, int, int, int, int]:
    """BM, BN, BK, warps, stages, splits. Few rows: the weight is the traffic, and many programs put it on its way."""
    splits = max(1, min(4, 32768 // outputs))
    if bits == 4:
        return min(64, max(16, triton.next_power_of_2(rows))), 32, GROUP, 4, 2, splits
    if rows <= 16:
        return 8 if rows <= 8 else 16, 32, 256, 2, 4, splits
    if rows <= 32:
        return 32, 32, 128, 2, 4, min(2, splits)
    if rows <= 64:
        return 64, 64, 128, 4, 3, splits
    return 128, 64, 128, 4, 3, min(2, splits)
