"""Weights that are stored quantised, on their way to the kernels' packing: joined, divided over ranks, never rounded.

What `millrace quantize` wrote comes back as the numbers that quantising would give. Of others, the integers, zero
points and scales are kept; scales in another dtype than the model's are rounded to it, as other engines do.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import get_args

import torch
from torch import Tensor

from services.engine.kernels.quantize import FOREIGN_GROUPS, GROUP, Bits, Quantized, coded4, factored, foreign
from services.engine.model.split import Split
from shared.errors import CheckpointError
from shared.model.checkpoint import Checkpoint
from shared.model.config import ModelConfig
from shared.model.config_file import Quantization
from shared.model.stored_integers import StoredIntegers

_STORED_DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


@dataclass(frozen=True, slots=True)
class Integers:
    """Weight [out, in]: (values + 2^(bits - 1) - zero) * scale * row."""

    values: Tensor  # [out, in] int8
    scale: Tensor  # [out, groups]: of others in the dtype of the activations; else float32, each that of a code
    zero: Tensor | None  # [out, groups] int16; None: symmetric
    row: Tensor | None  # [out], in the dtype of the activations; None: 1
    bits: Bits
    group: int  # inputs that share a scale; 0: all of an output

    @property
    def scheme(self) -> tuple[object, ...]:
        """Everything that weights have in common which are joined."""
        return self.bits, self.group, self.zero is None, self.row is None

    def part(self, split: Split, dim: int, name: str) -> "Integers":
        """Return a rank's part of the outputs (dim 0) or of the inputs (dim 1).

        Raises:
            CheckpointError: a group of inputs would be divided.
        """
        if split.size == 1:
            return self
        if dim == 0:
            zero, row = (None if part is None else split.part(part, 0) for part in (self.zero, self.row))
            return replace(self, values=split.part(self.values, 0), scale=split.part(self.scale, 0), zero=zero, row=row)
        values = split.part(self.values, 1)
        if self.scale.shape[1] == 1:
            return replace(self, values=values)
        if values.shape[1] % self.group:
            raise CheckpointError(
                f"weight {name} has scales for groups of {self.group} inputs, which do not divide the "
                f"{values.shape[1]} inputs that each of {split.size} ranks has"
            )
        zero = None if self.zero is None else split.part(self.zero, 1)
        return replace(self, values=values, scale=split.part(self.scale, 1), zero=zero)

    def packed(self) -> Quantized:
        """Return the weight in the kernels' packing."""
        values, inputs = self.values.contiguous(), self.values.shape[1]
        if self.row is not None:
            return coded4(values, self.row.contiguous(), self.scale.contiguous())
        if self.group:
            return foreign(values, self.scale, self._zero(), self.group, self.bits)
        groups, row = -(-inputs // GROUP), self.scale[:, 0].contiguous()
        if self.zero is None and self.bits == 8:
            return Quantized(values, row, 8, inputs)
        if self.zero is None:
            ones = torch.ones(len(values), groups, device=values.device)
            return coded4(values, row, ones)
        return foreign(values, self.scale.expand(-1, groups), self._zero().expand(-1, groups), GROUP, self.bits)

    def _zero(self) -> Tensor:
        half = 1 << (self.bits - 1)
        return torch.full_like(self.scale, half, dtype=torch.int16) if self.zero is None else self.zero


def integers_of(stored: StoredIntegers, dtype: torch.dtype, name: str, own: bool) -> Integers:
    """Return a stored weight with scales of the activations' dtype.

    Args:
        own: the checkpoint is of `millrace quantize`.

    Raises:
        CheckpointError: scales of four bits are not products of ours, in a checkpoint of our own.
    """
    values, scale, zero = stored.values, stored.scale, stored.zero
    assert stored.group in (0, *FOREIGN_GROUPS)
    # The products of float32 are not exact: their scales are kept as they are.
    if not own or stored.bits == 8 or dtype == torch.float32:
        return Integers(values, scale.to(dtype), zero, None, stored.bits, stored.group)
    both = factored(scale.float(), dtype)
    if both is None:
        raise CheckpointError(f"weight {name}: its scales are not as millrace quantize writes them; quantise it again")
    return Integers(values, both[1], zero, both[0], stored.bits, stored.group)


def rounded_scales(checkpoint: Checkpoint, config: ModelConfig) -> Iterator[str]:
    """Describe scales that are stored in another dtype than the model's, and rounded to it."""
    wider = checkpoint.scale_dtypes() - {_STORED_DTYPES[config.dtype]}
    if wider and config.dtype != "float32" and config.stored not in get_args(Quantization):
        yield f"scales of quantised weights are stored as {', '.join(sorted(wider))} and rounded to {config.dtype}"


def joined(weights: Sequence[Integers], names: Sequence[str]) -> Integers:
    """Return the rows of weights one after another.

    Raises:
        CheckpointError: they are not quantised alike.
    """
    for weight, name in zip(weights, names, strict=True):
        if weight.scheme != weights[0].scheme:
            raise CheckpointError(f"weights {names[0]} and {name} are multiplied as one and are not quantised alike")
    first, zeros, rows = weights[0], [w.zero for w in weights], [w.row for w in weights]
    return replace(
        first,
        values=torch.cat([w.values for w in weights]),
        scale=torch.cat([w.scale for w in weights]),
        zero=None if first.zero is None else torch.cat([zero for zero in zeros if zero is not None]),
        row=None if first.row is None else torch.cat([row for row in rows if row is not None]),
    )
