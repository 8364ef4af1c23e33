"""Weight-only quantisation: symmetric, one scale per output channel, 8 or 4 bits.

For each output row o of W [.., out, in], computed in float32 from amax = max over `in` of |W[o]|:
int8: q = round(W / amax * 127), scale = amax / 127; int4: q = round(W / amax * 7), scale = amax / 7. Ties round away
from zero. W is then q * scale. Two int4 values share a byte along `in`: the even one is the low nibble, both in two's
complement. The scheme is FastDeploy's weight-only one, so that its accuracy figures apply.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Bits = Literal[4, 8]


@dataclass(frozen=True, slots=True)
class Quantized:
    """A quantised weight of logical shape [.., out, in]."""

    data: Tensor  # int8 [.., out, in], or uint8 [.., out, in / 2] for 4 bits
    scale: Tensor  # [.., out], in the dtype of the activations
    bits: Bits

    @property
    def in_features(self) -> int:
        return int(self.data.shape[-1]) * (2 if self.bits == 4 else 1)

    @property
    def nbytes(self) -> int:
        return self.data.nbytes + self.scale.nbytes

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> "Quantized":
        """The weight at `index` of the first dimension, without a copy."""
        return Quantized(self.data[index], self.scale[index], self.bits)


Weight = Tensor | Quantized


def quantize(weight: Tensor, bits: Bits) -> Quantized:
    """
    Args:
        weight: [.., out, in], floating point. Its dtype becomes that of the scales.

    Raises:
        ValueError: 4 bits and an odd `in`.
    """
    if bits == 4 and weight.shape[-1] % 2:
        raise ValueError(f"4-bit weights need an even number of inputs, not {weight.shape[-1]}")
    limit = 127 if bits == 8 else 7
    exact = weight.float()
    amax = exact.abs().amax(-1, keepdim=True)
    # A row of zeros has amax 0: its values are 0 whatever they are divided by.
    scaled = exact / torch.where(amax > 0, amax, 1) * limit
    values = (scaled.abs() + 0.5).floor().clamp_(max=limit).copysign(scaled).to(torch.int8)
    scale = (amax / limit).squeeze(-1).to(weight.dtype)
    return Quantized(values if bits == 8 else _pack(values), scale, bits)


def dequantize(weight: Quantized) -> Tensor:
    """[.., out, in] in the dtype of the scales."""
    values = weight.data if weight.bits == 8 else _unpack(weight.data)
    return values.to(weight.scale.dtype) * weight.scale.unsqueeze(-1)


def dense(weight: Weight) -> Tensor:
    """The weight itself, or what its quantised form stands for."""
    return dequantize(weight) if isinstance(weight, Quantized) else weight


def _pack(values: Tensor) -> Tensor:
    nibbles = values.view(torch.uint8) & 0xF
    return nibbles[..., 0::2] | (nibbles[..., 1::2] << 4)


def _unpack(data: Tensor) -> Tensor:
    nibbles = torch.stack((data & 0xF, data >> 4), -1).flatten(-2)
    return (nibbles ^ 8).view(torch.int8) - 8
