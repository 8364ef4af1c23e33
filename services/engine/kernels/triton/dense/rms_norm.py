"""Root-mean-square normalisation in one pass over each row, with the sums before it fused in."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from services.engine.kernels.triton.common.launch import pdl_options, wait_for_previous_kernel
from services.engine.kernels.triton.common.sizes import ceil_pow2


@triton.jit
def rounded_norm(x, weight_ptr, column, inside, H, eps):
    """Return the norm of one row: x [BLOCK], 0 past H."""
    exact = x.to(tl.float32)
    inverse = tl.rsqrt(tl.sum(exact * exact, 0) / H + eps)
    weight = tl.load(weight_ptr + column, inside, 0.0).to(tl.float32)
    return ((exact * inverse).to(x.dtype).to(tl.float32) * weight).to(x.dtype)


@triton.jit
def residual_sum(parts_ptr, residual_ptr, at, inside, part_stride, PARTS: tl.constexpr):
    """Return a row of the residual stream plus a product in parts, in the stream's dtype: [BLOCK], 0 where outside."""
    exact = tl.load(residual_ptr + at, inside, 0.0).to(tl.float32)
    summed = tl.zeros(at.shape, tl.float32)
    for part in tl.static_range(PARTS):
        summed += tl.load(parts_ptr + part * part_stride + at, inside, 0.0).to(tl.float32)
    return (exact + summed).to(residual_ptr.dtype.element_ty)


@triton.jit
def _rms_norm_kernel(x_ptr, weight_ptr, out_ptr, H, eps, PDL: tl.constexpr, BLOCK: tl.constexpr):
    wait_for_previous_kernel(PDL)
    row = tl.program_id(0).to(tl.int64) * H
    column = tl.arange(0, BLOCK)
    inside = column < H
    x = tl.load(x_ptr + row + column, inside, 0.0)
    tl.store(out_ptr + row + column, rounded_norm(x, weight_ptr, column, inside, H, eps), inside)


@triton.jit
def _add_norm_kernel(
    parts_ptr, residual_ptr, weight_ptr, out_ptr, total_ptr, H, eps, part_stride,
    PARTS: tl.constexpr, PDL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    wait_for_previous_kernel(PDL)
    row = tl.program_id(0).to(tl.int64) * H
    column = tl.arange(0, BLOCK)
    inside = column < H
    x = residual_sum(parts_ptr, residual_ptr, row + column, inside, part_stride, PARTS)
    tl.store(total_ptr + row + column, x, inside)
    tl.store(out_ptr + row + column, rounded_norm(x, weight_ptr, column, inside, H, eps), inside)


def row_warps(block: int) -> int:
    """Return the warps of a program that holds a row."""
    return 8 if block >= 4096 else 4


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See the reference: services.engine.kernels.reference.rms_norm. `x` contiguous."""
    rows, width = x.shape
    out, block = torch.empty_like(x), ceil_pow2(width)
    _rms_norm_kernel[(rows,)](
        x, weight, out, width, eps, BLOCK=block, num_warps=row_warps(block), **pdl_options(x)
    )  # fmt: skip
    return out


def add_norm(partial: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return `add_rms_norm` of a product that is still in parts.

    Args:
        partial: [parts, N, H], contiguous.
        residual: [N, H], contiguous.

    Returns:
        the norm and the new residual, each [N, H] in the dtype of `residual`.
    """
    parts, rows, width = partial.shape
    out, total, block = torch.empty_like(residual), torch.empty_like(residual), ceil_pow2(width)
    _add_norm_kernel[(rows,)](
        partial, residual, weight, out, total, width, eps, partial.stride(0),
        PARTS=parts, BLOCK=block, num_warps=row_warps(block), **pdl_options(residual),
    )  # fmt: skip
    return out, total
