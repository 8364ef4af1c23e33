"""Operations that only move rows: each reads them once and writes them once."""

import triton
import triton.language as tl
from torch import Tensor

from services.mm_encoder.vision.tables import Tables
from services.mm_encoder.vision.weights import Linear

BLOCK = 1024  # values of a program of quick_gelu: 16 bytes of each thread's
WARPS = 4


@triton.jit
def _add_norm_kernel(
    x_ptr, more_ptr, weight_ptr, bias_ptr, out_ptr, eps, WIDTH: tl.constexpr, PADDED: tl.constexpr, ADDS: tl.constexpr
):
    row, column = tl.program_id(0).to(tl.int64), tl.arange(0, PADDED)
    mask = column < WIDTH
    at = row * WIDTH + column
    x = tl.load(x_ptr + at, mask, 0.0)
    if ADDS:
        x = (x.to(tl.float32) + tl.load(more_ptr + at, mask, 0.0).to(tl.float32)).to(x_ptr.dtype.element_ty)
        tl.store(x_ptr + at, x, mask)
    wide = x.to(tl.float32)
    centred = tl.where(mask, wide - tl.sum(wide, 0) / WIDTH, 0.0)
    scale = tl.rsqrt(tl.sum(centred * centred, 0) / WIDTH + eps)
    weight = tl.load(weight_ptr + column, mask, 0.0).to(tl.float32)
    bias = tl.load(bias_ptr + column, mask, 0.0).to(tl.float32)
    tl.store(out_ptr + at, (centred * scale * weight + bias).to(out_ptr.dtype.element_ty), mask)


def add_norm(x: Tensor, more: Tensor | None, norm: Linear, eps: float) -> Tensor:
    """Add `more`, if any, to x in place; return LayerNorm of the sum. Both are [n, hidden], contiguous."""
    out, width = x.new_empty(x.shape), x.shape[1]
    _add_norm_kernel[(len(x),)](
        x, more, norm.weight, norm.bias, out, eps, width, _ceil_pow2(width), more is not None,
        num_warps=WARPS,
    )  # fmt: skip
    return out


@triton.jit
def _rotate_kernel(qkv_ptr, cos_ptr, sin_ptr, stride, ROTATED: tl.constexpr, HALF: tl.constexpr, PADDED: tl.constexpr):
    """Rotate a row's queries and keys: ROTATED pairs of dimensions, HALF of them a head."""
    row, pair = tl.program_id(0).to(tl.int64), tl.arange(0, PADDED)
    mask = pair < ROTATED
    inside = pair % HALF
    at = qkv_ptr + row * stride + pair // HALF * (2 * HALF) + inside
    cos, sin = tl.load(cos_ptr + row * HALF + inside, mask, 0.0), tl.load(sin_ptr + row * HALF + inside, mask, 0.0)
    left, right = tl.load(at, mask, 0.0), tl.load(at + HALF, mask, 0.0)
    wide_left, wide_right = left.to(tl.float32), right.to(tl.float32)
    tl.store(at, (wide_left * cos - wide_right * sin).to(left.dtype), mask)
    tl.store(at + HALF, (wide_right * cos + wide_left * sin).to(left.dtype), mask)


def rotate(qkv: Tensor, heads: int, tables: Tables) -> None:
    """Rotate queries and keys in place, in fp32: dimension i of a head with dimension i + head_dim / 2."""
    rotated = qkv.shape[1] // 3  # as many pairs as a query has dimensions: queries and keys have twice that
    half = rotated // heads // 2
    _rotate_kernel[(len(qkv),)](
        qkv, tables.cos, tables.sin, qkv.stride(0), rotated, half, _ceil_pow2(rotated), num_warps=WARPS
    )


@triton.jit
def _quick_gelu_kernel(x_ptr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at, mask = x_ptr + tl.program_id(0).to(tl.int64) * WIDTH + column, column < WIDTH
    x = tl.load(at, mask, 0.0)
    wide = x.to(tl.float32)
    tl.store(at, (wide * tl.sigmoid(1.702 * wide)).to(x.dtype), mask)


def quick_gelu(x: Tensor) -> None:
    """Compute x * sigmoid(1.702 x) in place; x is [n, width], contiguous."""
    rows, width = x.shape
    _quick_gelu_kernel[(rows, -(-width // BLOCK))](x, width, BLOCK, num_warps=WARPS)


def _ceil_pow2(count: int) -> int:
    """Return the least power of two that is not below `count`. Triton's own takes microseconds on the host."""
    return 1 << (count - 1).bit_length()
