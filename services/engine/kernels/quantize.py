"""Weight-only quantisation: symmetric, one scale per output channel, 8 or 4 bits.

For each output row o of W [.., out, in], computed in float32 from amax = max over `in` of |W[o]|:
int8: q = round(W / amax * 127), scale = amax / 127; int4: q = round(W / amax * 7), scale = amax / 7. Ties round away
from zero. W is then q * scale. The scheme is FastDeploy's weight-only one, so that its accuracy figures apply.

Four int4 values share an int16 word, in two's complement: of each GROUP of inputs, word l holds inputs l, 64 + l,
128 + l and 192 + l, the first in its lowest bits. So a tile of words is four tiles of weights, each of inputs in order.
"""

from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Bits = Literal[4, 8]
GROUP = 256  # inputs that share 64 words
PLANES = 4


@dataclass(frozen=True, slots=True)
class Quantized:
    """A quantised weight of logical shape [.., out, in]."""

    data: Tensor  # int8 [.., out, in], or int16 [.., out, 64 * groups] for 4 bits
    scale: Tensor  # [.., out], in the dtype of the activations
    bits: Bits
    in_features: int
    plain: Tensor | None = None  # dequantised, [.., out, in], where memory allows

    @property
    def nbytes(self) -> int:
        return self.data.nbytes + self.scale.nbytes + (0 if self.plain is None else self.plain.nbytes)

    @property
    def stored_inputs(self) -> int:
        """Inputs of a stored row, with those that pad the last group of four bits, which are 0."""
        return self.data.shape[-1] * (PLANES if self.bits == 4 else 1)

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> "Quantized":
        """Return the weight at `index` of the first dimension, without a copy."""
        return Quantized(self.data[index], self.scale[index], self.bits, self.in_features)


Weight = Tensor | Quantized


def quantize(weight: Tensor, bits: Bits) -> Quantized:
    """Quantise a weight.

    Args:
        weight: [.., out, in], floating point. Its dtype becomes that of the scales.
    """
    limit = 127 if bits == 8 else 7
    exact = weight.float()
    amax = exact.abs().amax(-1, keepdim=True)
    # A row of zeros has amax 0: its values are 0 whatever the divisor.
    scaled = exact / torch.where(amax > 0, amax, 1) * limit
    values = (scaled.abs() + 0.5).floor().clamp_(max=limit).copysign(scaled).to(torch.int8)
    scale = (amax / limit).squeeze(-1).to(weight.dtype)
    return Quantized(values if bits == 8 else _pack(values), scale, bits, weight.shape[-1])


def dequantize(weight: Quantized) -> Tensor:
    """Return [.., out, in] in the dtype of the scales."""
    values = weight.data if weight.bits == 8 else _unpack(weight.data, weight.in_features)
    return values.to(weight.scale.dtype) * weight.scale.unsqueeze(-1)


def with_plain(weight: Quantized) -> Quantized:
    """Return the weight with its dequantised form beside it, with which products of many rows are faster."""
    return replace(weight, plain=dequantize(weight))


def in_features(weight: Weight) -> int:
    return weight.in_features if isinstance(weight, Quantized) else weight.shape[-1]


def dense(weight: Weight) -> Tensor:
    """Return the weight, dequantised if it is quantised."""
    return dequantize(weight) if isinstance(weight, Quantized) else weight


def _pack(values: Tensor) -> Tensor:
    """Pack int8 [.., in] to int16 words."""
    padded = F.pad(values, (0, -values.shape[-1] % GROUP))
    planes = padded.view(*padded.shape[:-1], -1, PLANES, GROUP // PLANES).to(torch.int16) & 0xF
    words = torch.zeros_like(planes[..., 0, :])
    for plane in range(PLANES):
        words |= planes[..., plane, :] << (4 * plane)
    return words.flatten(-2)


def _unpack(words: Tensor, inputs: int) -> Tensor:
    """Unpack int16 words to int8 [.., inputs]."""
    grouped = words.view(*words.shape[:-1], -1, GROUP // PLANES)
    planes = torch.stack([(grouped >> (4 * plane)) & 0xF for plane in range(PLANES)], -2)
    return ((planes ^ 8) - 8).to(torch.int8).flatten(-3)[..., :inputs]
