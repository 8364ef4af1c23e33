"""Weight-only quantisation: symmetric, 8 bits with a scale for each output, or 4 bits with scales for groups of inputs.

8 bits, for each output row o of W [.., out, in], in float32: amax = max over `in` of |W[o]|, scale = amax / 127,
q = round(W / scale), ties away from zero; W is then q * scale.

4 bits, for each group of GROUP inputs of a row: W is q * group scale * row scale, q in -8..7. A group scale is a byte,
four bits of exponent and four of mantissa: code c stands for 2^(c // 16 - 15) * (1 + c % 16 / 16). So it takes half of
what a bfloat16 would, and its product with q is exact in bfloat16. The row scale puts the group with the largest |W|
at the top of that range. From the first code that clips nothing on, CANDIDATES codes downwards are tried, and the one
with the least squared error is taken: a group's largest weights are clipped where that is better for the others.

Four int4 values share an int16 word, in two's complement: of each BLOCK of inputs, word l holds inputs l, 128 + l,
256 + l and 384 + l, the first in its lowest bits. So a tile of words is four tiles of weights, each of inputs in order
and of one group. The codes of a block's groups share an int32, the first in its lowest bits.

What others have quantised keeps its own scales and zero points: W is (q - zero) * scale, q and zero in 0..15, or 0..255
of 8 bits, for groups of 32, 64 or 128 inputs. The values are stored as q - 8, or q - 128, as ours are; a word for each
group has the scale in its upper half and -zero / UNITS in its lower, both in the dtype of the activations. Row scales
are 1.
"""

from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Bits = Literal[4, 8]
BLOCK = 512  # inputs that share 128 words
PLANES = 4  # values of a word
GROUP = BLOCK // PLANES  # inputs that share a scale
CANDIDATES = 8  # scales that are tried for a group; more gain nothing (docs/notebook/engine.md)
LOWEST, HIGHEST = -8, 7  # of four bits
TOP = 31 / 16  # the largest group scale
UNITS = 64  # products of four bits are of the values divided by it: see triton/dense/matmul.py
FOREIGN_GROUPS = (32, 64, 128)  # inputs that share a scale of others
SHIFT, BIAS = 19, 112 << 4  # a code is bits 19 to 26 of the float32 that it stands for, less BIAS


@dataclass(frozen=True, slots=True)
class Quantized:
    """A quantised weight of logical shape [.., out, in]."""

    data: Tensor  # int8 [.., out, in], or int16 [.., out, 128 * blocks] for 4 bits
    scale: Tensor  # [.., out], in the dtype of the activations
    bits: Bits
    in_features: int
    # Contiguous: codes of our scales of 4 bits, [.., blocks, out] int32; or words of others' scales and zero points,
    # [.., groups, out] int32, or int64 of float32: of 4 bits of whole blocks, and of each block the first groups of its
    # planes come first, then the second ones.
    groups: Tensor | None = None
    plain: Tensor | None = None  # dequantised, [.., out, in], where memory allows
    subgroups: int = 0  # others' groups of GROUP inputs; 0: the scales are ours

    @property
    def nbytes(self) -> int:
        parts = (self.data, self.scale, self.groups, self.plain)
        return sum(part.nbytes for part in parts if part is not None)

    @property
    def stored_inputs(self) -> int:
        """Inputs of a stored row, with those that pad the last block of four bits, which are 0."""
        return self.data.shape[-1] * (PLANES if self.bits == 4 else 1)

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> "Quantized":
        """Return the weight at `index` of the first dimension, without a copy."""
        groups = None if self.groups is None else self.groups[index]
        return Quantized(
            self.data[index], self.scale[index], self.bits, self.in_features, groups, subgroups=self.subgroups
        )


Weight = Tensor | Quantized


def quantize(weight: Tensor, bits: Bits) -> Quantized:
    """Quantise a weight.

    Args:
        weight: [.., out, in], floating point. Its dtype becomes that of the row scales.
    """
    return _quantize8(weight) if bits == 8 else _quantize4(weight)


def _quantize8(weight: Tensor) -> Quantized:
    exact = weight.float()
    amax = exact.abs().amax(-1, keepdim=True)
    # A row of zeros has amax 0: its values are 0 whatever the divisor.
    scaled = exact / torch.where(amax > 0, amax, 1) * 127
    values = (scaled.abs() + 0.5).floor().clamp_(max=127).copysign(scaled).to(torch.int8)
    return Quantized(values, (amax / 127).squeeze(-1).to(weight.dtype), 8, weight.shape[-1])


def _quantize4(weight: Tensor) -> Quantized:
    exact = _split(_padded(weight).float(), -1, GROUP)
    amax = exact.abs().amax(-1)
    row = (amax.amax(-1) / (HIGHEST * TOP)).to(weight.dtype)
    unit = torch.where(row > 0, row.float(), 1).unsqueeze(-1)
    highest = ((amax / (HIGHEST * unit)).view(torch.int32) >> SHIFT) - BIAS + 1
    best, least = torch.zeros_like(highest), torch.full_like(amax, torch.inf)
    for below in range(CANDIDATES):
        code = (highest - below).clamp_(0, 255)
        scale = (group_scale(code) * unit).unsqueeze(-1)
        error = (_nearest(exact, scale).mul_(scale) - exact).square_().sum(-1)
        best = torch.where(error < least, code, best)
        least = torch.minimum(error, least)
    values = _nearest(exact, (group_scale(best) * unit).unsqueeze(-1)).to(torch.int8)
    return Quantized(pack(values.flatten(-2)), row, 4, weight.shape[-1], pack_codes(best))


def _nearest(exact: Tensor, scale: Tensor) -> Tensor:
    return (exact / scale).round_().clamp_(LOWEST, HIGHEST)


def group_scale(code: Tensor) -> Tensor:
    """Return what int32 codes stand for, in float32."""
    return ((code + BIAS) << SHIFT).view(torch.float32)


def dequantize(weight: Quantized) -> Tensor:
    """Return [.., out, in] in the dtype of the row scales."""
    dtype, scale = weight.scale.dtype, weight.scale.unsqueeze(-1)
    if weight.groups is None:
        return weight.data.to(dtype) * scale
    if weight.subgroups:
        return _dequantize_foreign(weight, weight.groups)
    scales = group_scales(weight.groups)
    values = _split(_unpack(weight.data), -1, GROUP).float() * scales.unsqueeze(-1)
    return (values.flatten(-2)[..., : weight.in_features].to(dtype) * scale).contiguous()


def _dequantize_foreign(weight: Quantized, words: Tensor) -> Tensor:
    each = GROUP // weight.subgroups
    if weight.bits == 8:
        pairs = words.transpose(-1, -2).contiguous().unsqueeze(-1).view(weight.scale.dtype).float()
        zero, scale = pairs.repeat_interleave(each, -2)[..., : weight.in_features, :].unbind(-1)
        return ((weight.data.float() + 128 + zero * UNITS) * scale).to(weight.scale.dtype)
    pairs = _split(words.transpose(-1, -2), -1, weight.subgroups, PLANES).transpose(-1, -2)
    zero, scale = pairs.contiguous().view(weight.scale.dtype).float().reshape(*pairs.shape, 2, 1).unbind(-2)
    values = _split(_unpack(weight.data), *pairs.shape[-3:], each).float()
    exact = ((values - LOWEST) + zero * UNITS) * scale
    return exact.flatten(-4)[..., : weight.in_features].to(weight.scale.dtype).contiguous()


def foreign(values: Tensor, scale: Tensor, zero: Tensor, group: int, bits: Bits) -> Quantized:
    """Return a weight that others have quantised, in our packing.

    Args:
        values: [.., out, in] int8: q - 8, or q - 128 of 8 bits.
        scale: [.., out, groups], in the dtype of the activations.
        zero: [.., out, groups] integers, of the range of q.
        group: inputs that share a scale, one of FOREIGN_GROUPS. The last group may be shorter.
    """
    pairs = torch.stack([-zero.to(scale.dtype) / UNITS, scale], -1)
    words = pairs.view(torch.int64 if scale.dtype == torch.float32 else torch.int32).squeeze(-1)
    inputs, subgroups, ones = values.shape[-1], GROUP // group, scale.new_ones(scale.shape[:-1])
    if bits == 8:
        return Quantized(values, ones, 8, inputs, words.transpose(-1, -2).contiguous(), subgroups=subgroups)
    words = F.pad(words, (0, -(-inputs // BLOCK) * BLOCK // group - words.shape[-1]))
    ordered = _split(words, -1, PLANES, subgroups).transpose(-1, -2).flatten(-3)
    return Quantized(pack(values), ones, 4, inputs, ordered.transpose(-1, -2).contiguous(), subgroups=subgroups)


def coded4(values: Tensor, row: Tensor, scales: Tensor) -> Quantized:
    """Return four bits with scales of ours, in our packing.

    Args:
        values: [.., out, in] int8, -8..7.
        row: [.., out], in the dtype of the activations.
        scales: [.., out, groups] float32, each that of a code.
    """
    codes = (scales.contiguous().view(torch.int32) >> SHIFT) - BIAS
    padded = F.pad(codes, (0, -codes.shape[-1] % PLANES))
    return Quantized(pack(values), row, 4, values.shape[-1], pack_codes(padded))


def factored(scales: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
    """Return row scales [.., out] in `dtype` and group scales [.., out, groups] float32, each that of a code, whose
    products are `scales`; None if there are none.

    Args:
        scales: [.., out, groups] float32: products that were exact, so that they are the same numbers again. Where a
            row has several such pairs, the one with the largest code is returned.
    """
    if scales.is_meta:  # nothing to find, and of thousands of experts it would take a minute
        return scales[..., 0].to(dtype), scales
    largest = scales.amax(-1)
    # Of the row's largest scale, whose exponent may be that of TOP: other exponents are other row scales.
    mantissas = torch.arange(31, 15, -1, device=scales.device).view(-1, *(1 for _ in largest.shape)) / 16
    rows = (largest / mantissas).to(dtype).float().unsqueeze(-1)
    ratios = scales / rows
    fits = (_is_code(ratios) & (ratios * rows == scales)).all(-1)
    if not bool((fits.any(0) | (largest == 0)).all()):
        return None
    row = rows.squeeze(-1).gather(0, fits.int().argmax(0, keepdim=True))[0]
    zeros = (largest == 0).unsqueeze(-1)
    codes = torch.where(zeros, 1, scales / torch.where(zeros, 1, row.unsqueeze(-1)))
    return torch.where(largest == 0, 0, row).to(dtype), codes


def _is_code(scales: Tensor) -> Tensor:
    bits = scales.contiguous().view(torch.int32)
    code = (bits >> SHIFT) - BIAS
    return (bits & ((1 << SHIFT) - 1) == 0) & (code >= 0) & (code < 256)


def values_of(weight: Quantized) -> Tensor:
    """Return the stored values, [.., out, in] int8."""
    return weight.data if weight.bits == 8 else _unpack(weight.data)[..., : weight.in_features]


def group_scales(words: Tensor) -> Tensor:
    """Return the scales of groups, [.., out, groups] float32."""
    rows = words.transpose(-1, -2).clone(memory_format=torch.contiguous_format)
    return group_scale(rows.view(torch.uint8).to(torch.int32))


def with_plain(weight: Quantized) -> Quantized:
    """Return the weight with its dequantised form beside it, with which products of many rows are faster."""
    return replace(weight, plain=dequantize(weight))


def in_features(weight: Weight) -> int:
    return weight.in_features if isinstance(weight, Quantized) else weight.shape[-1]


def stored_inputs(weight: Weight) -> int:
    """Return the inputs that a weight stores, padding included."""
    return weight.stored_inputs if isinstance(weight, Quantized) else weight.shape[-1]


def bits_of(weight: Weight) -> int:
    """Return the bits of a stored value: 4, 8, or 16 for what is not quantised."""
    return weight.bits if isinstance(weight, Quantized) else 16


def dense(weight: Weight) -> Tensor:
    """Return the weight, dequantised if it is quantised."""
    return dequantize(weight) if isinstance(weight, Quantized) else weight


def _split(tensor: Tensor, *sizes: int) -> Tensor:
    """Return the last dimension as several; -1 is what remains."""
    return tensor.reshape(*tensor.shape[:-1], *sizes)


def _padded(weight: Tensor) -> Tensor:
    return F.pad(weight, (0, -weight.shape[-1] % BLOCK))


def pack(values: Tensor) -> Tensor:
    """Pack int8 values of four bits, [.., in], to int16 words."""
    planes = _split(_padded(values), -1, PLANES, GROUP).to(torch.int16) & 0xF
    words = torch.zeros_like(planes[..., 0, :])
    for plane in range(PLANES):
        words |= planes[..., plane, :] << (4 * plane)
    return words.flatten(-2)


def pack_codes(codes: Tensor) -> Tensor:
    """Pack codes, [.., out, groups] of whole blocks, to int32 words [.., blocks, out]."""
    return codes.to(torch.uint8).view(torch.int32).transpose(-1, -2).contiguous()


def _unpack(words: Tensor) -> Tensor:
    """Unpack int16 words to int8 [.., stored inputs]."""
    grouped = _split(words, -1, GROUP)
    planes = torch.stack([(grouped >> (4 * plane)) & 0xF for plane in range(PLANES)], -2)
    return ((planes ^ 8) - 8).to(torch.int8).flatten(-3)
