"""Projection to queries, keys and values, rotary embedding, and the write to the paged cache.

With very few rows one launch, whose epilogue rotates and stores; with more, the product is followed by one pass over
its rows.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from services.engine.kernels.quantize import Weight
from services.engine.kernels.triton.common.launch import pdl_options, wait_for_previous_kernel
from services.engine.kernels.triton.common.sizes import ceil_div, ceil_pow2
from services.engine.kernels.triton.dense.linear import partial_linear, unsplit_launch, unsplit_product

# Heads of a row that a program rotates, and its warps: few rows are spread out, many are read in long stretches.
FEW_ROWS_SHAPE, MANY_ROWS_SHAPE, MANY_ROWS = (4, 2), (8, 4), 512


@triton.jit
def _rotate_kernel(
    parts_ptr, cos_ptr, sin_ptr, slots_ptr, query_ptr, keys_ptr, values_ptr, heads, kv_heads, part_stride, HALF,
    PARTS: tl.constexpr, PDL: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    wait_for_previous_kernel(PDL)
    row = tl.program_id(0).to(tl.int64)
    head = (tl.program_id(1) * HEADS + tl.arange(0, HEADS))[:, None]
    at = tl.arange(0, 2 * BLOCK)[None, :]
    inside = (head < heads + 2 * kv_heads) & (at < 2 * HALF)
    source = parts_ptr + (row * (heads + 2 * kv_heads) + head) * 2 * HALF + at
    whole = tl.zeros((HEADS, 2 * BLOCK), tl.float32)
    for part in tl.static_range(PARTS):
        whole += tl.load(source + part * part_stride, inside, 0.0).to(tl.float32)
    plain = whole.to(query_ptr.dtype.element_ty)
    # The two of a pair are neighbours: memory is read and written in order, and one thread has both.
    even, odd = tl.split(plain.to(tl.float32).reshape(HEADS, BLOCK, 2))
    angle = row * HALF + tl.arange(0, BLOCK)
    cos = tl.load(cos_ptr + angle, tl.arange(0, BLOCK) < HALF, 0.0)[None, :]
    sin = tl.load(sin_ptr + angle, tl.arange(0, BLOCK) < HALF, 0.0)[None, :]
    rotated = tl.join(even * cos - odd * sin, odd * cos + even * sin).to(plain.dtype).reshape(HEADS, 2 * BLOCK)
    tl.store(query_ptr + (row * heads + head) * 2 * HALF + at, rotated, inside & (head < heads))
    cached = tl.load(slots_ptr + row) * kv_heads - heads
    is_key = (head >= heads) & (head < heads + kv_heads)
    tl.store(keys_ptr + (cached + head) * 2 * HALF + at, rotated, inside & is_key)
    tl.store(values_ptr + (cached - kv_heads + head) * 2 * HALF + at, plain, inside & (head >= heads + kv_heads))


@triton.jit
def _qkv_kernel(
    x_ptr, w_ptr, scale_ptr, cos_ptr, sin_ptr, slots_ptr, query_ptr, keys_ptr, values_ptr,
    M, N, IN, x_stride, w_stride, KEYS, HALF,
    BITS: tl.constexpr, PARTS: tl.constexpr, PART: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, EVEN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Project, rotate and store. KEYS: the number of outputs that are keys."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    acc = unsplit_product(x_ptr, w_ptr, scale_ptr, m, n, n < N, M, IN, x_stride, w_stride, BITS, PARTS, PART, EVEN, PDL)
    dtype = query_ptr.dtype.element_ty
    plain = acc.to(dtype)
    even, odd = tl.split(tl.permute(tl.reshape(plain.to(tl.float32), (BN // 2, 2, BM)), (0, 2, 1)))
    rows, pair = (m < M)[None, :], tl.program_id(0) * (BN // 2) + tl.arange(0, BN // 2)
    angle = m[None, :] * HALF + pair[:, None] % HALF
    cos, sin = tl.load(cos_ptr + angle, rows, 0.0), tl.load(sin_ptr + angle, rows, 0.0)
    both = tl.join(even * cos - odd * sin, odd * cos + even * sin)
    rotated = tl.reshape(tl.permute(both, (0, 2, 1)), (BN, BM)).to(dtype)
    n, queries = n[:, None], N - 2 * KEYS
    tl.store(query_ptr + m[None, :] * queries + n, rotated, rows & (n < queries))
    cached = tl.load(slots_ptr + m, m < M, 0)[None, :] * KEYS + n - queries
    tl.store(keys_ptr + cached, rotated, rows & (n >= queries) & (n < N - KEYS))
    tl.store(values_ptr + cached - KEYS, plain, rows & (n >= N - KEYS) & (n < N))


def qkv(
    x: Tensor, weight: Weight, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, slots: Tensor,
    query: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """See the reference. All but `x` contiguous, and so is the result."""
    kv_heads, dim = keys.shape[2:]
    heads = len(weight) // dim - 2 * kv_heads
    if query is None:
        query = torch.empty(len(x), heads, dim, dtype=x.dtype, device=x.device)
    launch = unsplit_launch(x, weight)
    if launch is None:
        rotate(partial_linear(x, weight), cos, sin, slots, query, keys, values)
    else:
        _qkv_kernel[launch.grid](
            *launch.arguments,
            cos,
            sin,
            slots,
            query,
            keys,
            values,
            *launch.sizes,
            kv_heads * dim,
            dim // 2,
            **launch.options,
        )
    return query


def rotate(
    partial: Tensor, cos: Tensor, sin: Tensor, slots: Tensor, query: Tensor, keys: Tensor, values: Tensor
) -> None:
    """Sum the parts of the product, rotate, and write queries, keys and values.

    Args:
        partial: [parts, N, (heads + 2 kv_heads) D], contiguous.
        query: [N, heads, D]; written.
    """
    parts, rows, _ = partial.shape
    (_, heads, dim), kv_heads = query.shape, keys.shape[2]
    program_heads, warps = FEW_ROWS_SHAPE if rows < MANY_ROWS else MANY_ROWS_SHAPE
    _rotate_kernel[(rows, ceil_div(heads + 2 * kv_heads, program_heads))](
        partial, cos, sin, slots, query, keys, values, heads, kv_heads, partial.stride(0), dim // 2,
        PARTS=parts, HEADS=program_heads, BLOCK=ceil_pow2(dim // 2), num_warps=warps, **pdl_options(partial),
    )  # fmt: skip
