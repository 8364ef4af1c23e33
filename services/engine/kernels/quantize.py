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
SHIFT, BIAS = 19, 112 << 4  # a code is bits 19 to 26 of the float32 that it stands for, less BIAS


@dataclass(frozen=True, slots=True)
class Quantized:
    """A quantised weight of logical shape [.., out, in]."""

    data: Tensor  # int8 [.., out, in], or int16 [.., out, 128 * blocks] for 4 bits
    scale: Tensor  # [.., out], in the dtype of the activations
    bits: Bits
    in_features: int
    groups: Tensor | None = None  # of 4 bits: scales of groups, [.., blocks, out] int32, contiguous
    plain: Tensor | None = None  # dequantised, [.., out, in], where memory allows

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
        return Quantized(self.data[index], self.scale[index], self.bits, self.in_features, groups)


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
    scales = group_scales(weight.groups)
    values = _split(_unpack(weight.data), -1, GROUP).float() * scales.unsqueeze(-1)
    return (values.flatten(-2)[..., : weight.in_features].to(dtype) * scale).contiguous()


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
