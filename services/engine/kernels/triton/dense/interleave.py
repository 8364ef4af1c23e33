"""The order in which the inputs of four-bit weights are multiplied where there are many rows.

A matrix instruction multiplies 16 inputs. 16 words of services.engine.kernels.quantize are unpacked to 16 inputs of
each plane of their group, so 64 inputs at a time are taken that are not neighbours; activations are stored in memory in
that order.
"""

import triton
import triton.language as tl

from services.engine.kernels.quantize import GROUP, PLANES

TAKEN = 16  # inputs of an instruction
_GROUP, _PLANES, _TAKEN = tl.constexpr(GROUP), tl.constexpr(PLANES), tl.constexpr(TAKEN)
_LANES = tl.constexpr(GROUP // PLANES)


@triton.jit
def interleaved(column):
    """Which input is multiplied as the `column`th, and which place an input has: the plane and the 16 words it is of
    change places, so that this is its own inverse. Columns are a range that begins at a multiple of 16."""
    at = column % _GROUP
    place = column - at + at % _LANES // _TAKEN * _LANES + at // _LANES * _TAKEN + at % _TAKEN
    return tl.max_contiguous(tl.multiple_of(place, _TAKEN), _TAKEN)


@triton.jit
def in_turn(planes):
    """Four planes [N, 16] side by side: [N, 64]. No value moves, it is the layout that is told."""
    a, b, c, d = planes
    # Joined last dimensions count planes by twos and by ones.
    joined = tl.permute(tl.join(tl.join(a, c), tl.join(b, d)), (0, 2, 3, 1))
    return tl.reshape(joined, (a.shape[0], _PLANES * _TAKEN))
