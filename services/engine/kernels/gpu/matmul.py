"""Pieces of the kernels that multiply by a weight.

The weight is the left operand: a tile [BN, BK] of it is read, turned into the activations' dtype in registers and
multiplied with [BK, BM] of the activations' transpose. On Hopper the left operand of a matrix instruction may come from
registers, the right one may not, and few rows of activations cost no more than the instruction's smallest width.

Four bits come as the words of services.engine.kernels.quantize: nibble j of a word belongs to plane j of its group, so
that a tile of words is eight tiles of weights without any shuffling. Scales are per output, and multiply the sum.
"""

import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from services.engine.kernels.quantize import Quantized, Weight

# Two words a thread in, eight pairs of bfloat16 out. 0x4300 is 128 in bfloat16, whose low mantissa bits count units:
# (n & 15) ^ 8 in them makes 136 + n, from which 136 is taken. One instruction and a half a weight.
_UNPACK = tl.constexpr(
    "{ .reg .b32 a, b, s;"
    "prmt.b32 a, $8, $9, 0x5410; prmt.b32 b, $8, $9, 0x7632;"
    "lop3.b32 $0, a, 0x000F000F, 0x43084308, 0x6A;"
    "shr.u32 s, a, 4; lop3.b32 $1, s, 0x000F000F, 0x43084308, 0x6A;"
    "shr.u32 s, a, 8; lop3.b32 $2, s, 0x000F000F, 0x43084308, 0x6A;"
    "shr.u32 s, a, 12; lop3.b32 $3, s, 0x000F000F, 0x43084308, 0x6A;"
    "lop3.b32 $4, b, 0x000F000F, 0x43084308, 0x6A;"
    "shr.u32 s, b, 4; lop3.b32 $5, s, 0x000F000F, 0x43084308, 0x6A;"
    "shr.u32 s, b, 8; lop3.b32 $6, s, 0x000F000F, 0x43084308, 0x6A;"
    "shr.u32 s, b, 12; lop3.b32 $7, s, 0x000F000F, 0x43084308, 0x6A;"
    "mov.b32 s, 0x43084308;"
    "sub.bf16x2 $0, $0, s; sub.bf16x2 $1, $1, s; sub.bf16x2 $2, $2, s; sub.bf16x2 $3, $3, s;"
    "sub.bf16x2 $4, $4, s; sub.bf16x2 $5, $5, s; sub.bf16x2 $6, $6, s; sub.bf16x2 $7, $7, s; }"
)
# Four bytes in, two pairs of bfloat16 out. A byte is its low seven bits less 128 if the eighth is set; both terms,
# raised by 128, are bit patterns of bfloat16: 0x4300 plus the low bits, and 0x4300 plus the eighth.
_WIDEN = tl.constexpr(
    "{ .reg .b32 a, b, c, d;"
    "prmt.b32 a, $2, 0x43434343, 0x4140; prmt.b32 b, $2, 0x43434343, 0x4342;"
    "and.b32 c, a, 0xFF80FF80; and.b32 d, b, 0xFF80FF80;"
    "and.b32 a, a, 0xFF7FFF7F; and.b32 b, b, 0xFF7FFF7F;"
    "sub.bf16x2 $0, a, c; sub.bf16x2 $1, b, d; }"
)
_INTERPRETED = tl.constexpr(knobs.runtime.interpret)


@triton.jit
def unpack(words, dtype: tl.constexpr):
    """Eight planes of signed four-bit values, each of the shape of `words`."""
    if dtype == tl.bfloat16 and not _INTERPRETED:
        return tl.inline_asm_elementwise(
            _UNPACK, "=r,=r,=r,=r,=r,=r,=r,=r,r,r", [words], dtype=(tl.bfloat16,) * 8, is_pure=True, pack=2
        )
    return (
        _plane(words, 0, dtype),
        _plane(words, 1, dtype),
        _plane(words, 2, dtype),
        _plane(words, 3, dtype),
        _plane(words, 4, dtype),
        _plane(words, 5, dtype),
        _plane(words, 6, dtype),
        _plane(words, 7, dtype),
    )


@triton.jit
def _plane(words, J: tl.constexpr, dtype: tl.constexpr):
    return ((((words >> (4 * J)) & 0xF) ^ 8) - 8).to(tl.float32).to(dtype)


@triton.jit
def widen(values, dtype: tl.constexpr):
    """`values` in `dtype`."""
    if values.dtype == tl.int8 and dtype == tl.bfloat16 and not _INTERPRETED:
        return tl.inline_asm_elementwise(_WIDEN, "=r,=r,r", [values], dtype=tl.bfloat16, is_pure=True, pack=4)
    # By way of float32, since the interpreter takes an integer for bfloat16's bits.
    return values if values.dtype == dtype else values.to(tl.float32).to(dtype)


@triton.jit
def dot_tile(acc, w_ptrs, w_mask, x_ptrs, x_mask, k, IN, BK: tl.constexpr, BITS: tl.constexpr):
    """acc [BN, BM] plus weight[:, k : k + BK] times x[:, k : k + BK]^T.

    w_ptrs [BN, 1] point at rows of stored words or values, x_ptrs [1, BM] at rows of x. `IN` is the length of x's rows.
    With 4 bits BK is the group of the packing.
    """
    if BITS == 4:
        lane = tl.arange(0, BK // 8)
        planes = unpack(tl.load(w_ptrs + (k // 8 + lane)[None, :], w_mask, 0), x_ptrs.dtype.element_ty)
        for j in tl.static_range(8):
            column = k + j * (BK // 8) + lane
            x = tl.load(x_ptrs + column[:, None], x_mask & (column < IN)[:, None], 0.0)
            acc = tl.dot(planes[j], x, acc, input_precision="ieee")
    else:
        column = k + tl.arange(0, BK)
        inside = column < IN
        w = tl.load(w_ptrs + column[None, :], w_mask & inside[None, :], 0)
        x = tl.load(x_ptrs + column[:, None], x_mask & inside[:, None], 0.0)
        acc = tl.dot(widen(w, x.dtype), x, acc, input_precision="ieee")
    return acc


@triton.jit
def dot_two(a, b, a_ptrs, b_ptrs, w_mask, x_ptrs, x_mask, k, IN, BK: tl.constexpr, BITS: tl.constexpr):
    """`dot_tile` of two weights with the same x, which is read once where registers allow it."""
    if BITS == 4 and a.shape[1] >= 64:
        a = dot_tile(a, a_ptrs, w_mask, x_ptrs, x_mask, k, IN, BK, BITS)
        b = dot_tile(b, b_ptrs, w_mask, x_ptrs, x_mask, k, IN, BK, BITS)
    elif BITS == 4:
        lane = tl.arange(0, BK // 8)
        words = (k // 8 + lane)[None, :]
        planes_a = unpack(tl.load(a_ptrs + words, w_mask, 0), x_ptrs.dtype.element_ty)
        planes_b = unpack(tl.load(b_ptrs + words, w_mask, 0), x_ptrs.dtype.element_ty)
        for j in tl.static_range(8):
            column = k + j * (BK // 8) + lane
            x = tl.load(x_ptrs + column[:, None], x_mask & (column < IN)[:, None], 0.0)
            a = tl.dot(planes_a[j], x, a, input_precision="ieee")
            b = tl.dot(planes_b[j], x, b, input_precision="ieee")
    else:
        column = k + tl.arange(0, BK)
        inside = column < IN
        w_inside = w_mask & inside[None, :]
        x = tl.load(x_ptrs + column[:, None], x_mask & inside[:, None], 0.0)
        a = tl.dot(widen(tl.load(a_ptrs + column[None, :], w_inside, 0), x.dtype), x, a, input_precision="ieee")
        b = tl.dot(widen(tl.load(b_ptrs + column[None, :], w_inside, 0), x.dtype), x, b, input_precision="ieee")
    return a, b


def parts(weight: Weight) -> tuple[Tensor, Tensor, int]:
    """Stored values, scales and bits. A weight that is not quantised stands in for its own scales, which go unread."""
    if isinstance(weight, Quantized):
        return weight.data, weight.scale, weight.bits
    return weight, weight, 16
