"""Order in which the inputs of four-bit weights are multiplied where there are many rows.

A matrix instruction multiplies 16 inputs. 16 words of services.engine.kernels.quantize unpack to 16 inputs of each
plane of their block, so the 64 inputs of one step are not neighbours; activations are stored in memory in the same
order.
"""

import triton
import triton.language as tl

from services.engine.kernels.quantize import BLOCK, GROUP, PLANES

INSTRUCTION_INPUTS = 16  # inputs of an instruction
_BLOCK, _PLANES, _INPUTS = tl.constexpr(BLOCK), tl.constexpr(PLANES), tl.constexpr(INSTRUCTION_INPUTS)
_GROUP, _STEP = tl.constexpr(GROUP), tl.constexpr(PLANES * INSTRUCTION_INPUTS)


@triton.jit
def columns_and_inputs(first, INTERLEAVED: tl.constexpr):
    """Return the columns of the block of inputs that begins at `first`, and the input that is multiplied as each.

    Both are [steps, planes, inputs of an instruction], so that the compiler sees which inputs are neighbours.
    """
    step = tl.arange(0, _BLOCK // _STEP)[:, None, None]
    plane = tl.arange(0, _PLANES)[None, :, None]
    beside = tl.arange(0, _INPUTS)[None, None, :]
    columns = first + step * _STEP + plane * _INPUTS + beside
    inputs = first + plane * _GROUP + step * _INPUTS + beside if INTERLEAVED else columns
    return columns, inputs


@triton.jit
def columns_of(first, COUNT: tl.constexpr):
    """Return the columns as which COUNT inputs from `first` on are multiplied. COUNT is a multiple of 16 that divides
    `first` and a group."""
    at, beside = first % _BLOCK, tl.arange(0, COUNT)
    column = first - at + at % _GROUP // _INPUTS * _STEP + at // _GROUP * _INPUTS
    return _sixteens(tl.multiple_of(column, _INPUTS) + beside // _INPUTS * _STEP + beside % _INPUTS)


@triton.jit
def _sixteens(place):
    return tl.max_contiguous(tl.multiple_of(place, _INPUTS), _INPUTS)


@triton.jit
def side_by_side(planes):
    """Concatenate four planes [N, 16] to [N, 64]. No value moves: only the layout changes."""
    a, b, c, d = planes
    # Joined last dimensions count planes by twos and by ones.
    joined = tl.permute(tl.join(tl.join(a, c), tl.join(b, d)), (0, 2, 3, 1))
    return tl.reshape(joined, (a.shape[0], _PLANES * _INPUTS))
