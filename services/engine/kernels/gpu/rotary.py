"""Rotary embedding of queries and keys, one program for a row and a head."""

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _rotary_kernel(x_ptr, cos_ptr, sin_ptr, row_stride, head_stride, HALF, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    pair = tl.arange(0, BLOCK)
    inside = pair < HALF
    base = x_ptr + row * row_stride + tl.program_id(1) * head_stride
    even = tl.load(base + 2 * pair, inside, 0.0)
    odd = tl.load(base + 2 * pair + 1, inside, 0.0)
    cos = tl.load(cos_ptr + row * HALF + pair, inside, 0.0)
    sin = tl.load(sin_ptr + row * HALF + pair, inside, 0.0)
    a, b = even.to(tl.float32), odd.to(tl.float32)
    tl.store(base + 2 * pair, (a * cos - b * sin).to(even.dtype), inside)
    tl.store(base + 2 * pair + 1, (b * cos + a * sin).to(even.dtype), inside)


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    """See the reference. The last dimension of `x` is contiguous; cos and sin are contiguous."""
    rows, heads, dim = x.shape
    _rotary_kernel[(rows, heads)](
        x, cos, sin, x.stride(0), x.stride(1), dim // 2, BLOCK=triton.next_power_of_2(dim // 2), num_warps=1
    )
