"""Cosines and sines of a step's rotary angles, in one launch."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from services.engine.kernels.triton.common.launch import pdl_options, wait_for_previous_kernel
from services.engine.kernels.triton.common.sizes import ceil_div, ceil_pow2

ANGLES = 1024  # of a program


@triton.jit
def _rotary_tables_kernel(
    positions_ptr, frequencies_ptr, axes_ptr, cos_ptr, sin_ptr, N, HALF, axis_stride,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    wait_for_previous_kernel(PDL)
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    angle = tl.arange(0, BLOCK)
    axis = tl.load(axes_ptr + angle, angle < HALF, 0)[None, :]
    frequency = tl.load(frequencies_ptr + angle, angle < HALF, 0.0)[None, :]
    mask = (row < N) & (angle < HALF)[None, :]
    angles = tl.load(positions_ptr + axis * axis_stride + row, mask, 0).to(tl.float32) * frequency
    at = row.to(tl.int64) * HALF + angle[None, :]
    tl.store(cos_ptr + at, tl.cos(angles), mask)
    tl.store(sin_ptr + at, tl.sin(angles), mask)


def rotary_tables(positions: Tensor, frequencies: Tensor, axes: Tensor) -> tuple[Tensor, Tensor]:
    """See the reference: services.engine.kernels.reference.rotary. The last dimension of `positions` is contiguous."""
    (_, rows), half = positions.shape, len(frequencies)
    block = ceil_pow2(half)
    program_rows = max(1, ANGLES // block)
    cos, sin = torch.empty(2, rows, half, dtype=torch.float32, device=positions.device)
    _rotary_tables_kernel[(ceil_div(rows, program_rows),)](
        positions, frequencies, axes, cos, sin, rows, half, positions.stride(0),
        ROWS=program_rows, BLOCK=block, num_warps=4, **pdl_options(positions),
    )  # fmt: skip
    return cos, sin
