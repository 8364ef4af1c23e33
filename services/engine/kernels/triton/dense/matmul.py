"""Pieces of the kernels that multiply by a weight.

The weight is the left operand: a tile [BN, BK] of it is loaded, converted to the activations' dtype in registers and
multiplied with [BK, BM] of the activations' transpose. On Hopper the left operand of a matrix instruction may come from
registers, the right one may not, and few rows of activations cost no more than the instruction's smallest width.

Four bits come as the words of services.engine.kernels.quantize: nibble j of a word belongs to plane j of its block, so
that a tile of words is four tiles of weights without any shuffling. Scales of groups multiply values as they are
unpacked, by the instruction that makes them numbers; scales of outputs multiply the sum: see `scales`.
"""

import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from services.engine.kernels.quantize import (
    BIAS,
    BLOCK,
    GROUP,
    PLANES,
    SHIFT,
    UNITS,
    Quantized,
    Weight,
)

# Values come as multiples of 2^-6, which `scales` takes back. A bit pattern below 256 is, as a bfloat16, that number
# times 2^-133: it is linear from the subnormals into the first normal ones. One fused multiplication by 2^127 (0x7F00)
# and an addition then make any small number without a conversion.
PER_UNIT = tl.constexpr(UNITS)
STEP = 256  # four-bit inputs of a step of a product: words of whole lines, half a block


def _unpack_asm(plane: int) -> str:
    """Return the instructions that make two words, and the word of codes of their row, twice, a pair of bfloat16.

    With their sign bit flipped, nibbles are 8 more than their values; in the upper half of a byte they count sixteen
    times. With s the scale of the plane, below 2 and no subnormal, they are multiplied by s 2^127 or s 2^123, and added
    is -8 s / 64. Multiplying s by a power of two, and by -1, is adding to its exponent (0x0080 is one), and to its
    sign; a code becomes a bfloat16 in the same addition.
    """
    nibble, sign = (0x00F000F0, 0x00800080) if plane % 2 else (0x000F000F, 0x00080008)
    factor, one = 1 << (SHIFT - 16), BIAS << (SHIFT - 16)
    more, less = (one + (0x3D80 if plane % 2 else 0x3F80)) * 0x10001, (one + 0x7E80) * 0x10001
    return (
        "{ .reg .b32 w, s, more, less;"
        f"shr.u32 w, $1, {plane // 2 * 8}; lop3.b32 w, w, {nibble:#x}, {sign:#x}, 0x6A;"
        f"prmt.b32 s, $2, 0, 0x4{plane}4{plane};"
        f"mad.lo.u32 more, s, {factor}, {more:#x}; mad.lo.u32 less, s, {factor}, {less:#x};"
        "fma.rn.bf16x2 $0, w, more, less; }"
    )


def _unpack_foreign_asm(plane: int) -> str:
    """Return the instructions that make two words, and the word of scale and zero point of each, a pair of bfloat16.

    A nibble is made the number q / 64 as above, and -zero / 64 is added, without a rounding. The product with the scale
    is a fused multiplication, with -0 added, since cards before Hopper have no other.
    """
    nibble, sign, up = (0x00F000F0, 0x00800080, 0x7D00) if plane % 2 else (0x000F000F, 0x00080008, 0x7F00)
    return (
        "{ .reg .b32 w, s, z, up, none;"
        f"shr.u32 w, $1, {plane // 2 * 8}; lop3.b32 w, w, {nibble:#x}, {sign:#x}, 0x6A;"
        f"prmt.b32 s, $2, $3, 0x7632; prmt.b32 z, $2, $3, 0x5410; mov.b32 up, {up * 0x10001:#x};"
        "mov.b32 none, 0x80008000; fma.rn.bf16x2 w, w, up, z; fma.rn.bf16x2 $0, w, s, none; }"
    )


_UNPACK = tl.constexpr(tuple(tl.constexpr(_unpack_asm(plane)) for plane in range(PLANES)))
_UNPACK_FOREIGN = tl.constexpr(tuple(tl.constexpr(_unpack_foreign_asm(plane)) for plane in range(PLANES)))
# Four bytes in, two pairs of bfloat16 out. With its sign bit flipped, a byte is 128 more than its value: less 128 / 64.
_WIDEN = tl.constexpr(
    "{ .reg .b32 u, one, less; mov.b32 one, 0x7F007F00; mov.b32 less, 0xC000C000; xor.b32 u, $2, 0x80808080;"
    "prmt.b32 $0, u, 0, 0x4140; prmt.b32 $1, u, 0, 0x4342;"
    "fma.rn.bf16x2 $0, $0, one, less; fma.rn.bf16x2 $1, $1, one, less; }"
)
# The same, with the word of scale and zero point of each byte: as in `_unpack_foreign_asm`. Four bytes that a thread
# has one after the other may be of several rows.
_WIDEN_FOREIGN = tl.constexpr(
    "{ .reg .b32 u, v, s, z, one, none; mov.b32 one, 0x7F007F00; mov.b32 none, 0x80008000; xor.b32 v, $2, 0x80808080;"
    "prmt.b32 u, v, 0, 0x4140; prmt.b32 s, $3, $4, 0x7632; prmt.b32 z, $3, $4, 0x5410;"
    "fma.rn.bf16x2 u, u, one, z; fma.rn.bf16x2 u, u, s, none;"
    "prmt.b32 v, v, 0, 0x4342; prmt.b32 s, $5, $6, 0x7632; prmt.b32 z, $5, $6, 0x5410;"
    "fma.rn.bf16x2 v, v, one, z; fma.rn.bf16x2 $1, v, s, none; mov.b32 $0, u; }"
)
_AFTER_WGMMA = tl.constexpr(
    "{ wgmma.wait_group.sync.aligned 0; mov.b32 $0, $4; mov.b32 $1, $5; mov.b32 $2, $6; mov.b32 $3, $7; }"
)
_INTERPRETED = tl.constexpr(knobs.runtime.interpret)
_BIAS, _SHIFT = tl.constexpr(BIAS), tl.constexpr(SHIFT)
_BLOCK, _GROUP, _PLANES = tl.constexpr(BLOCK), tl.constexpr(GROUP), tl.constexpr(PLANES)


@triton.jit
def unpack(words, groups, J: tl.constexpr, dtype: tl.constexpr):
    """Return plane J of words, of their shape: signed four-bit values times the scales of their groups, in units.

    groups: [BN, 1], a row's codes of the block that the words are of.
    """
    if dtype == tl.bfloat16 and not _INTERPRETED:
        return tl.inline_asm_elementwise(
            _UNPACK[J], "=r,r,r,r", [words, groups], dtype=tl.bfloat16, is_pure=True, pack=2
        )
    scale = ((((groups >> (J * 8)) & 0xFF) + _BIAS) << _SHIFT).to(tl.float32, bitcast=True)
    return (((((words >> (4 * J)) & 0xF) ^ 8) - 8).to(tl.float32) * scale / PER_UNIT).to(dtype)


@triton.jit
def unpack_foreign(words, scales, J: tl.constexpr, dtype: tl.constexpr):
    """Return plane J of words, of their shape: values less their zero point, times their scale, in units.

    scales: [BN, 1], words of a row's scale and zero point for all inputs of the plane that `words` has.
    """
    if dtype == tl.bfloat16 and not _INTERPRETED:
        return tl.inline_asm_elementwise(
            _UNPACK_FOREIGN[J], "=r,r,r,r", [words, scales], dtype=tl.bfloat16, is_pure=True, pack=2
        )
    zero, scale = _zero_and_scale(scales, dtype)
    return (((((words >> (4 * J)) & 0xF) ^ 8).to(tl.float32) / PER_UNIT + zero) * scale).to(dtype)


@triton.jit
def _zero_and_scale(scales, dtype: tl.constexpr):
    """Return the halves of words in float32; the zero points are negative, in units."""
    if scales.dtype == tl.int64:
        zero, scale = scales.to(tl.int32).to(tl.float32, bitcast=True), (scales >> 32).to(tl.int32)
        scale = scale.to(tl.float32, bitcast=True)
    elif dtype == tl.float16:
        zero = scales.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        scale = (scales >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    else:
        zero = (scales << 16).to(tl.float32, bitcast=True)
        scale = (scales >> 16 << 16).to(tl.float32, bitcast=True)
    return zero, scale


@triton.jit
def widen_foreign(values, scales, dtype: tl.constexpr):
    """Convert int8 to `dtype`, in units: less their zero point, times their scale, of words as in `unpack_foreign`."""
    if dtype == tl.bfloat16 and not _INTERPRETED:
        return tl.inline_asm_elementwise(
            _WIDEN_FOREIGN, "=r,=r,r,r,r,r,r", [values, scales], dtype=tl.bfloat16, is_pure=True, pack=4
        )
    zero, scale = _zero_and_scale(scales, dtype)
    return (((values.to(tl.float32) + 128) / PER_UNIT + zero) * scale).to(dtype)


@triton.jit
def group_words(IN, BITS: tl.constexpr, SUBGROUPS: tl.constexpr):
    """Return the words of scales that a row of IN inputs has."""
    if SUBGROUPS == 0:
        words = blocks(IN)
    elif BITS == 4:
        words = blocks(IN) * _PLANES * SUBGROUPS
    else:
        words = tl.cdiv(IN, _GROUP // SUBGROUPS)
    return words


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
def blocks(IN):
    """Return the blocks of a row of IN four-bit inputs."""
    return tl.cdiv(IN, _BLOCK)


@triton.jit
def steps(IN, BK: tl.constexpr, BITS: tl.constexpr):
    """Return how many times BK inputs a product has: with 4 bits, all of whole blocks."""
    return blocks(IN) * (_BLOCK // BK) if BITS == 4 else tl.cdiv(IN, BK)


@triton.jit
def dot_tile(
    acc, w_ptrs, g_ptrs, w_mask, x_ptrs, x_mask, nth, IN, OUT,
    BK: tl.constexpr, BITS: tl.constexpr, SUBGROUPS: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Return acc [BN, BM] plus weight[:, nth] times x[:, nth]^T, of the `nth` BK inputs, in the order of `steps`.

    w_ptrs [BN, 1] point at rows of stored words or values, g_ptrs [BN, 1] at the scales of the first block, x_ptrs
    [1, BM] at rows of x. `IN` is the length of x's rows, `OUT` the weight's number of rows. With 4 bits BK is 4 times
    the words of a tile, and divides the block of the packing. EVEN: no input and no row is masked.
    """
    if BITS == 4 and SUBGROUPS == 0:
        lane = tl.arange(0, BK // 4)
        # Each thread gets the scales of what it unpacks only if they are loaded in four bytes at least, and made of
        # what is loaded with constants alone. Else Triton exchanges what was unpacked between threads.
        block = nth * BK // _BLOCK
        groups = load_stored(g_ptrs + block * OUT, w_mask, EVEN)
        words = load_stored(w_ptrs + (nth * (BK // 4) + lane)[None, :], w_mask, EVEN)
        first = tl.multiple_of(block * _BLOCK + (nth * BK - block * _BLOCK) // 4, BK // 4)
        # A separate sum, or the compiler makes the large matrix instructions wait for each other.
        part = tl.zeros(acc.shape, tl.float32)
        for j in tl.static_range(4):
            x = _activations(x_ptrs, x_mask, first + j * _GROUP + lane, IN, EVEN)
            part = tl.dot(unpack(words, groups, j, x.dtype), x, part, input_precision="ieee")
        acc += part
    elif BITS == 4:
        EACH: tl.constexpr = min(BK // 4, _GROUP // SUBGROUPS)  # words whose inputs of a plane are of one group
        lane = tl.arange(0, EACH)
        part = tl.zeros(acc.shape, tl.float32)
        for tile in tl.static_range(BK // 4 // EACH):
            word = nth * (BK // 4) + tile * EACH
            block = word // _GROUP
            words = load_stored(w_ptrs + (word + lane)[None, :], w_mask, EVEN)
            groups = g_ptrs + word * SUBGROUPS // _GROUP * _PLANES * OUT
            first = tl.multiple_of(block * _BLOCK + word - block * _GROUP, EACH)
            for j in tl.static_range(4):
                x = _activations(x_ptrs, x_mask, first + j * _GROUP + lane, IN, EVEN)
                w = unpack_foreign(words, load_stored(groups + j * OUT, w_mask, EVEN), j, x.dtype)
                part = tl.dot(w, x, part, input_precision="ieee")
        acc += part
    elif SUBGROUPS:
        ALIKE: tl.constexpr = min(BK, _GROUP // SUBGROUPS)  # inputs of one group
        for tile in tl.static_range(BK // ALIKE):
            first = nth * BK + tile * ALIKE
            column = first + tl.arange(0, ALIKE)
            groups = load_stored(g_ptrs + first * SUBGROUPS // _GROUP * OUT, w_mask & (first < IN), EVEN)
            w = load_stored(w_ptrs + column[None, :], w_mask & (column < IN)[None, :], EVEN)
            x = _activations(x_ptrs, x_mask, column, IN, EVEN)
            acc = tl.dot(widen_foreign(after_wgmma(w), groups, x.dtype), x, acc, input_precision="ieee")
    else:
        column = nth * BK + tl.arange(0, BK)
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


def subgroups_of(weight: Weight) -> int:
    """Return the groups of GROUP inputs of a weight that others have quantised, 0 of any other."""
    return weight.subgroups if isinstance(weight, Quantized) else 0


def storage(weight: Weight) -> tuple[Tensor, Tensor, Tensor]:
    """Return stored values, scales of outputs and scales of groups. Stored values stand in for scales that there are
    none of, which are not read."""
    if isinstance(weight, Quantized):
        return weight.data, weight.scale, weight.data if weight.groups is None else weight.groups
    return weight, weight, weight
