"""Matrix product with a quantised weight, dequantised in registers. A plain weight is the vendor library's business."""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from services.engine.kernels.gpu.matmul import dot_tile
from services.engine.kernels.quantize import GROUP, Quantized, Weight


@triton.jit
def _linear_kernel(
    x_ptr, w_ptr, scale_ptr, out_ptr, M, N, IN, x_stride, w_stride,
    BITS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    rows, columns = (m < M)[None, :], (n < N)[:, None]
    x_ptrs = x_ptr + m.to(tl.int64)[None, :] * x_stride
    w_ptrs = w_ptr + n.to(tl.int64)[:, None] * w_stride
    acc = tl.zeros((BN, BM), tl.float32)
    for k in range(0, IN, BK):
        acc = dot_tile(acc, w_ptrs, columns, x_ptrs, rows, k, IN, BK, BITS)
    acc *= tl.load(scale_ptr + n, n < N, 0.0).to(tl.float32)[:, None]
    tl.store(out_ptr + m.to(tl.int64)[None, :] * N + n[:, None], acc.to(out_ptr.dtype.element_ty), rows & columns)


def linear(x: Tensor, weight: Weight) -> Tensor:
    """See the reference. The rows of `x` may be strided."""
    if not isinstance(weight, Quantized):
        return F.linear(x, weight)
    rows, outputs = len(x), weight.scale.shape[0]
    bm, bn, bk, warps, stages = _tiles(rows, weight.bits)
    out = torch.empty(rows, outputs, dtype=x.dtype, device=x.device)
    _linear_kernel[(triton.cdiv(outputs, bn), triton.cdiv(rows, bm))](
        x, weight.data, weight.scale, out, rows, outputs, weight.in_features, x.stride(0), weight.data.stride(0),
        BITS=weight.bits, BM=bm, BN=bn, BK=bk, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return out


def _tiles(rows: int, bits: int) -> tuple[int, int, int, int, int]:
    """BM, BN, BK, warps, stages. Few rows: the weight is the traffic, and narrow tiles put every processor on it."""
    bk = GROUP if bits == 4 else 128
    if rows <= 128:
        return max(16, triton.next_power_of_2(rows)), 32, bk, 4, 4
    return 128, 128, bk if bits == 4 else 64, 8, 3
