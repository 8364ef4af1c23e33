"""Weights that a checkpoint stores as integers, in the layouts of compressed-tensors, AWQ and GPTQ.

All three mean the same: of each output, groups of inputs share a scale and a zero point, and W is (q - zero) * scale
with q in 0 .. 2^bits - 1. compressed-tensors packs q along the inputs of [out, in], eight nibbles to an int32, the
first in its lowest bits. GPTQ stores [in, out] and packs along the inputs too, and its zero points along the outputs,
each less one in the first version of its format. AWQ stores [in, out] and packs both along the outputs, of eight
the even ones first.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from shared.errors import CheckpointError
from shared.model.stored_quantization import GROUPS, Layout, Scheme

Parts = Mapping[str, Tensor]

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
_EVEN_FIRST = (0, 4, 1, 5, 2, 6, 3, 7)  # where AWQ has each of eight outputs


@dataclass(frozen=True, slots=True)
class StoredIntegers:
    """A weight of shape [out, in] as it is stored: (values + 2^(bits - 1) - zero) * scale."""

    values: Tensor  # [out, in] int8: q - 2^(bits - 1)
    scale: Tensor  # [out, groups], floating point
    zero: Tensor | None  # [out, groups] int16, in the numbers of q; None: 2^(bits - 1), a symmetric weight
    bits: Literal[4, 8]
    group: int  # inputs that share a scale; 0: all of an output


def read_integers(
    layout: Layout, schemes: Collection[Scheme], name: str, parts: Parts, shape: tuple[int, int]
) -> StoredIntegers:
    """Unpack a weight.

    Args:
        schemes: what config.json describes: those that may be this weight's.
        name: of the module, for errors.
        parts: its tensors by the suffixes of the layout; on the meta device, what is checked are shapes and dtypes.
        shape: [out, in].

    Raises:
        CheckpointError: a part is missing, or does not have the shape, bits or groups that are read.
    """
    missing = {"compressed-tensors": ("weight_scale",)}.get(layout, ("scales", "qzeros")) - parts.keys()
    for part in missing:
        raise CheckpointError(f"tensor {name}.{part} is missing")
    stored = _READERS[layout](name, parts, shape)
    # A row that is no longer than a group has one scale, as one without groups has.
    longer = [scheme.group for scheme in schemes if scheme.bits == stored.bits and scheme.group >= shape[1]]
    if stored.group == 0 and longer:
        stored = replace(stored, group=min(longer))
    if stored.zero is None and not _symmetric(schemes, stored):
        raise CheckpointError(f"tensor {name}.weight_zero_point is missing: config.json says symmetric false")
    return stored


def _symmetric(schemes: Collection[Scheme], stored: StoredIntegers) -> bool:
    """Return False if config.json gives zero points to weights of these bits and groups, or at least of these bits."""
    alike = [scheme for scheme in schemes if scheme.bits == stored.bits]
    closest = [scheme for scheme in alike if scheme.group == stored.group] or alike
    return not closest or any(scheme.symmetric for scheme in closest)


def _compressed_tensors(name: str, parts: Parts, shape: tuple[int, int]) -> StoredIntegers:
    packed, scale, zero = parts["weight_packed"], parts["weight_scale"], parts.get("weight_zero_point")
    if (said := parts.get("weight_shape")) is not None:
        _expect(f"{name}.weight_shape", said, (2,), torch.int32 if said.dtype == torch.int32 else torch.int64)
        if not said.is_meta and said.tolist() != list(shape):
            raise CheckpointError(f"tensor {name}.weight_shape is {said.tolist()}; the model's weight is {list(shape)}")
    bits = _bits(f"{name}.weight_packed", packed, shape, 1)
    group = _group(f"{name}.weight_scale", scale, shape)
    if zero is not None:
        _expect(f"{name}.weight_zero_point", zero, (-(-shape[0] * bits // 32), scale.shape[1]), torch.int32)
        zero = _unpacked(zero.T, bits)[:, : shape[0]].T
    return _integers(_unpacked(packed, bits)[:, : shape[1]], scale, zero, bits, group)


def _awq(name: str, parts: Parts, shape: tuple[int, int]) -> StoredIntegers:
    bits, scale, group, packed_zero = _transposed(name, parts, shape, 1)
    values, zero = (_even_first(_unpacked(packed, bits)).T for packed in (parts["qweight"], packed_zero))
    return _integers(values, scale, zero, bits, group)


def _gptq(name: str, parts: Parts, shape: tuple[int, int], less: int = 1) -> StoredIntegers:
    bits, scale, group, packed_zero = _transposed(name, parts, shape, 0)
    order = parts.get("g_idx")
    neighbours = torch.arange(shape[1], device=scale.device) // (group or shape[1])
    if order is not None:
        _expect(f"{name}.g_idx", order, (shape[1],), torch.int64 if order.dtype == torch.int64 else torch.int32)
    if order is not None and not order.is_meta and bool((order != neighbours).any()):
        raise CheckpointError(
            f"tensor {name}.g_idx puts inputs into groups by their activations (desc_act); only groups of neighbours "
            "are read"
        )
    zero = _unpacked(packed_zero, bits).T.to(torch.int16) + less
    return _integers(_unpacked(parts["qweight"].T, bits), scale, zero, bits, group)


def _gptq_v2(name: str, parts: Parts, shape: tuple[int, int]) -> StoredIntegers:
    return _gptq(name, parts, shape, less=0)


_READERS: dict[Layout, Callable[[str, Parts, tuple[int, int]], StoredIntegers]] = {
    "compressed-tensors": _compressed_tensors,
    "awq": _awq,
    "gptq": _gptq,
    "gptq_v2": _gptq_v2,
}


def _transposed(
    name: str, parts: Parts, shape: tuple[int, int], packed_dim: int
) -> tuple[Literal[4, 8], Tensor, int, Tensor]:
    """Check tensors that are stored as [in, out]; return bits, scales [out, groups], group, packed zero points."""
    scale = parts["scales"].T
    bits = _bits(f"{name}.qweight", parts["qweight"], shape[::-1], packed_dim)
    group = _group(f"{name}.scales", scale, shape)
    _expect(f"{name}.qzeros", parts["qzeros"], (scale.shape[1], shape[0] * bits // 32), torch.int32)
    return bits, scale, group, parts["qzeros"]


def _bits(name: str, packed: Tensor, shape: tuple[int, int], dim: int) -> Literal[4, 8]:
    """Return the bits of packed integers of a shape."""
    possible: tuple[Literal[4, 8], ...] = (4, 8)
    for bits in possible:
        expected = list(shape)
        expected[dim] = -(-shape[dim] * bits // 32)
        if list(packed.shape) == expected and packed.dtype == torch.int32:
            return bits
    raise CheckpointError(
        f"tensor {name} has shape {list(packed.shape)} and dtype {_dtype(packed)}, which is no weight of {list(shape)} "
        "in 4 or 8 bits, packed to I32"
    )


def _group(name: str, scale: Tensor, shape: tuple[int, int]) -> int:
    """Return the inputs that share a scale, 0 where an output has one."""
    outputs, inputs = shape
    if scale.dim() == 2 and len(scale) == outputs and scale.dtype in FLOATS:
        if scale.shape[1] == 1:
            return 0
        for group in GROUPS:
            if -(-inputs // group) == scale.shape[1]:
                return group
    raise CheckpointError(
        f"tensor {name} has {list(scale.shape)} scales of {_dtype(scale)} for a weight of {list(shape)}; groups of "
        f"{', '.join(map(str, GROUPS))} inputs, and one scale an output, are read"
    )


def _expect(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if tuple(tensor.shape) != shape or tensor.dtype != dtype:
        raise CheckpointError(
            f"tensor {name} has shape {list(tensor.shape)} and dtype {_dtype(tensor)}, not {list(shape)} of {dtype}"
        )


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _integers(unsigned: Tensor, scale: Tensor, zero: Tensor | None, bits: Literal[4, 8], group: int) -> StoredIntegers:
    # Bytes wrap: 0 .. 255 less 128 are -128 .. 127.
    values = (unsigned - (1 << (bits - 1))).view(torch.int8)
    return StoredIntegers(values, scale, None if zero is None else zero.to(torch.int16), bits, group)


def _unpacked(packed: Tensor, bits: int) -> Tensor:
    """Unpack int32 words [rows, words] to uint8 [rows, values], the lowest bits first."""
    unsigned = packed.contiguous().view(torch.uint8)
    if bits == 8:
        return unsigned
    return torch.stack((unsigned & 0xF, unsigned >> 4), -1).flatten(-2)


def _even_first(unpacked: Tensor) -> Tensor:
    """Put AWQ's outputs in order."""
    return unpacked.reshape(len(unpacked), -1, 8)[..., list(_EVEN_FIRST)].flatten(-2)
