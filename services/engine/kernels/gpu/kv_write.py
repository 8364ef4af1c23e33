"""Scatter the step's keys and values into their pages."""

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _kv_write_kernel(
    key_ptr, value_ptr, keys_ptr, values_ptr, slots_ptr, key_stride, value_stride, WIDTH, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    target = tl.load(slots_ptr + row) * WIDTH + column
    tl.store(keys_ptr + target, tl.load(key_ptr + row * key_stride + column, inside), inside)
    tl.store(values_ptr + target, tl.load(value_ptr + row * value_stride + column, inside), inside)


def kv_write(key: Tensor, value: Tensor, keys: Tensor, values: Tensor, slots: Tensor) -> None:
    """See the reference. The heads of one row of `key` and `value` are contiguous."""
    rows, kv_heads, dim = key.shape
    width = kv_heads * dim
    _kv_write_kernel[(rows,)](
        key,
        value,
        keys,
        values,
        slots,
        key.stride(0),
        value.stride(0),
        width,
        BLOCK=triton.next_power_of_2(width),
        num_warps=1,
    )
