"""Order in which the inputs of four-bit weights are multiplied where there are many rows.

A matrix instruction multiplies 16 inputs. 16 words of services.engine.kernels.quantize unpack to 16 inputs of each
plane of their group, so the 64 inputs of one step are not neighbours; activations are stored in memory in the same
order.
"""

import triton
import triton.language as tl

from services.engine.kernels.quantize import GROUP, PLANES

INSTRUCTION_INPUTS = 16  # inputs of an instruction
_GROUP, _PLANES, _INPUTS = tl.constexpr(GROUP), tl.constexpr(PLANES), tl.constexpr(INSTRUCTION_INPUTS)
_LANES = tl.constexpr(GROUP // PLANES)


@triton.jit
def interleaved(column):
    """Return the input that is multiplied as the `column`th, and just as well the column of an input: plane and words
    of 16 change places, so that the permutation is its own inverse. Columns are a range that begins at a multiple of
    16."""
    at = column % _GROUP
    place = column - at + at % _LANES // _INPUTS * _LANES + at // _LANES * _INPUTS + at % _INPUTS
    return tl.max_contiguous(tl.multiple_of(place, _INPUTS), _INPUTS)


@triton.jit
def side_by_side(planes):
    """Concatenate four planes [N, 16] to [N, 64]. No value moves: only the layout changes."""
    a, b, c, d = planes
    # Joined last dimensions count planes by twos and by ones.
    joined = tl.permute(tl.join(tl.join(a, c), tl.join(b, d)), (0, 2, 3, 1))
    return tl.reshape(joined, (a.shape[0], _PLANES * _INPUTS))
