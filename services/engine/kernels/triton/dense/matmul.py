"""Pieces of the kernels that multiply by a weight.

The weight is the left operand: a tile [BN, BK] of it is loaded, converted to the activations' dtype in registers and
multiplied with [BK, BM] of the activations' transpose. On Hopper the left operand of a matrix instruction may come from
registers, the right one may not, and few rows of activations cost no more than the instruction's smallest width.

Four bits come as the words of services.engine.kernels.quantize: nibble j of a word belongs to plane j of its group, so
that a tile of words is four tiles of weights without any shuffling. Scales are per output, and multiply the sum: see
`scales`.
"""

import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from services.engine.kernels.quantize import Quantized, Weight

# Values come as multiples of 2^-6, which `scales` takes back. A bit pattern below 256 is, as a bfloat16, that number
# times 2^-133: it is linear from the subnormals into the first normal ones. One fused multiplication by 2^127 (0x7F00)
# and an addition then make any small number without a conversion.
PER_UNIT = tl.constexpr(64)

# Two words in, four pairs of bfloat16 out. With their sign bit flipped, nibbles are 8 more than their values; in the
# upper half of a byte they count sixteen times, and are multiplied by 2^123 (0x7D00). Added is -8 / 64 (0xBE00).
_UNPACK = tl.constexpr(
    "{ .reg .b32 s, one, high, less;"
    "mov.b32 one, 0x7F007F00; mov.b32 high, 0x7D007D00; mov.b32 less, 0xBE00BE00; shr.u32 s, $4, 8;"
    "lop3.b32 $0, $4, 0x000F000F, 0x00080008, 0x6A; lop3.b32 $1, $4, 0x00F000F0, 0x00800080, 0x6A;"
    "lop3.b32 $2, s, 0x000F000F, 0x00080008, 0x6A; lop3.b32 $3, s, 0x00F000F0, 0x00800080, 0x6A;"
    "fma.rn.bf16x2 $0, $0, one, less; fma.rn.bf16x2 $1, $1, high, less;"
    "fma.rn.bf16x2 $2, $2, one, less; fma.rn.bf16x2 $3, $3, high, less; }"
)
# Four bytes in, two pairs of bfloat16 out. With its sign bit flipped, a byte is 128 more than its value: less 128 / 64.
_WIDEN = tl.constexpr(
    "{ .reg .b32 u, one, less; mov.b32 one, 0x7F007F00; mov.b32 less, 0xC000C000; xor.b32 u, $2, 0x80808080;"
    "prmt.b32 $0, u, 0, 0x4140; prmt.b32 $1, u, 0, 0x4342;"
    "fma.rn.bf16x2 $0, $0, one, less; fma.rn.bf16x2 $1, $1, one, less; }"
)
_AFTER_WGMMA = tl.constexpr(
    "{ wgmma.wait_group.sync.aligned 0; mov.b32 $0, $4; mov.b32 $1, $5; mov.b32 $2, $6; mov.b32 $3, $7; }"
)
_INTERPRETED = tl.constexpr(knobs.runtime.interpret)


@triton.jit
def unpack(words, dtype: tl.constexpr):
    """Unpack words to four planes of signed four-bit values in units, each of the shape of `words`."""
    if dtype == tl.bfloat16 and not _INTERPRETED:
        return tl.inline_asm_elementwise(
            _UNPACK, "=&r,=&r,=&r,=&r,r", [words], dtype=(tl.bfloat16,) * 4, is_pure=True, pack=2
        )
    return _plane(words, 0, dtype), _plane(words, 1, dtype), _plane(words, 2, dtype), _plane(words, 3, dtype)


@triton.jit
def _plane(words, J: tl.constexpr, dtype: tl.constexpr):
    return (((((words >> (4 * J)) & 0xF) ^ 8) - 8).to(tl.float32) / PER_UNIT).to(dtype)


@triton.jit
def widen(values, dtype: tl.constexpr):
    """Convert `values` to `dtype`: integers to units, others unchanged."""
    if values.dtype != tl.int8:
        return values
    if dtype == tl.bfloat16 and not _INTERPRETED:
        return tl.inline_asm_elementwise(_WIDEN, "=r,=r,r", [values], dtype=tl.bfloat16, is_pure=True, pack=4)
    return (values.to(tl.float32) / PER_UNIT).to(dtype)


@triton.constexpr_function
def _hopper() -> bool:
    return tl.target_info.cuda_capability_geq(9, 0) and not tl.target_info.cuda_capability_geq(10, 0)


@triton.jit
def after_wgmma(data):
    """Return stored values or words, after all matrix instructions have read their operands.

    Hopper's large ones read registers while the program goes on. Triton (3.6 and 3.7) starts those of a block of inputs
    and lets all but the first run, while values unpacked for the next block are written to the same registers
    (triton-lang/triton#9433). Unpacking after this waits for them.
    """
    if not _INTERPRETED and _hopper():
        PACK: tl.constexpr = 4 * 32 // data.dtype.primitive_bitwidth
        return tl.inline_asm_elementwise(
            _AFTER_WGMMA, "=&r,=&r,=&r,=&r,r,r,r,r", [data], dtype=data.dtype, is_pure=True, pack=PACK
        )
    return data


@triton.jit
def at_least_one(count):
    """Return `count` in a form from which the compiler sees that a loop over it runs at least once. Were there a way
    around the loop, sums would be set to 0 in two places, and ptxas would make matrix instructions wait for each
    other (its message C7515)."""
    return tl.maximum(count, 1)


@triton.jit
def load_stored(ptrs, mask, EVEN: tl.constexpr):
    """Load stored values; EVEN: without a mask."""
    return tl.load(ptrs) if EVEN else tl.load(ptrs, mask, 0)


@triton.jit
def _activations(x_ptrs, x_mask, column, IN, EVEN: tl.constexpr):
    """Load [len(column), BM] of x^T."""
    return tl.load(x_ptrs + column[:, None], x_mask if EVEN else x_mask & (column < IN)[:, None], 0.0)


@triton.jit
def scales(scale_ptrs, mask):
    """Load the float32 factors of sums of products with stored values."""
    return tl.load(scale_ptrs, mask, 0.0).to(tl.float32) * PER_UNIT


@triton.jit
def dot_tile(acc, w_ptrs, w_mask, x_ptrs, x_mask, block, IN, BK: tl.constexpr, BITS: tl.constexpr, EVEN: tl.constexpr):
    """Return acc [BN, BM] plus weight[:, block] times x[:, block]^T, of the `block`th BK inputs.

    w_ptrs [BN, 1] point at rows of stored words or values, x_ptrs [1, BM] at rows of x. `IN` is the length of x's
    rows. With 4 bits BK is the group of the packing. EVEN: BK divides IN, and w_mask is true everywhere.
    """
    if BITS == 4:
        lane = tl.arange(0, BK // 4)
        planes = unpack(
            load_stored(w_ptrs + (block * (BK // 4) + lane)[None, :], w_mask, EVEN), x_ptrs.dtype.element_ty
        )
        # A separate sum, or the compiler makes the large matrix instructions wait for each other.
        part = tl.zeros(acc.shape, tl.float32)
        for j in tl.static_range(4):
            x = _activations(x_ptrs, x_mask, block * BK + j * (BK // 4) + lane, IN, EVEN)
            part = tl.dot(planes[j], x, part, input_precision="ieee")
        acc += part
    else:
        column = block * BK + tl.arange(0, BK)
        w = load_stored(w_ptrs + column[None, :], w_mask & (column < IN)[None, :], EVEN)
        x = _activations(x_ptrs, x_mask, column, IN, EVEN)
        acc = tl.dot(widen(after_wgmma(w) if BITS == 8 else w, x.dtype), x, acc, input_precision="ieee")
    return acc


@triton.jit
def gate_or_up(first, BN: tl.constexpr):
    """Return, for each of BN rows of a tile with as many rows of the gate as of the up projection, its output and
    whether it is up. Eight of either by turns, so that the thread with an element of the gate has its partner too."""
    n = tl.arange(0, BN)
    return first + n // 16 * 8 + n % 8, n // 8 % 2


@triton.jit
def gated(acc, BN: tl.constexpr, BM: tl.constexpr):
    """Return silu(gate) up of a tile [BN, BM] with the rows of `gate_or_up`: [BN / 2, BM], in order."""
    gate, up = tl.split(tl.permute(tl.reshape(acc, (BN // 16, 2, 8, BM)), (0, 2, 3, 1)))
    return tl.reshape(gate * tl.sigmoid(gate) * up, (BN // 2, BM))


def storage(weight: Weight) -> tuple[Tensor, Tensor, int]:
    """Return stored values, scales and bits. A plain weight stands in for its own scales, which are not read."""
    if isinstance(weight, Quantized):
        return weight.data, weight.scale, weight.bits
    return weight, weight, 16
