"""Residual sum, norm and router scores of few rows, in one launch.

Every program of a row repeats the sum and the norm, which costs less than a second launch that waits for the first.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from services.engine.kernels.triton.common.launch import pdl_options, wait_for_previous_kernel
from services.engine.kernels.triton.common.sizes import ceil_div, ceil_pow2
from services.engine.kernels.triton.dense.rms_norm import residual_sum, rounded_norm

MAX_ROWS = 16  # up to here the plain units are as fast as the matrix units
EXPERTS = 4  # scores of a program


@triton.jit
def _add_norm_scores_kernel(
    parts_ptr, residual_ptr, norm_ptr, gate_ptr, out_ptr, total_ptr, scores_ptr, N, H, eps, part_stride,
    PARTS: tl.constexpr, EXPERTS: tl.constexpr, PDL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    expert = tl.program_id(1) * EXPERTS + tl.arange(0, EXPERTS)
    column = tl.arange(0, BLOCK)
    inside = column < H
    # The gates do not depend on the previous kernel.
    gate_ptrs = gate_ptr + expert[:, None] * H + column[None, :]
    gate = tl.load(gate_ptrs, (expert < N)[:, None] & inside[None, :], 0.0)
    wait_for_previous_kernel(PDL)
    at = row * H + column
    total = residual_sum(parts_ptr, residual_ptr, at, inside, part_stride, PARTS)
    x = rounded_norm(total, norm_ptr, column, inside, H, eps)
    if tl.program_id(1) == 0:
        tl.store(total_ptr + at, total, inside)
        tl.store(out_ptr + at, x, inside)
    tl.store(scores_ptr + row * N + expert, tl.sum(gate * x.to(tl.float32)[None, :], 1), expert < N)


def add_norm_scores(
    partial: Tensor, residual: Tensor, norm: Tensor, eps: float, gate: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return `add_norm` of a product still in parts, and the routers' scores of it.

    Args:
        partial: [parts, N, H], contiguous.
        residual: [N, H], contiguous.
        gate: [R, H] float32, contiguous.

    Returns:
        the norm x and the new residual, each [N, H] in the dtype of `residual`, and x @ gate^T, [N, R] float32.
    """
    parts, rows, width = partial.shape
    out, total = torch.empty_like(residual), torch.empty_like(residual)
    scores = torch.empty(rows, len(gate), dtype=torch.float32, device=residual.device)
    _add_norm_scores_kernel[(rows, ceil_div(len(gate), EXPERTS))](
        partial, residual, norm, gate, out, total, scores, len(gate), width, eps, partial.stride(0),
        PARTS=parts, EXPERTS=EXPERTS, BLOCK=ceil_pow2(width), num_warps=8, **pdl_options(residual),
    )  # fmt: skip
    return out, total, scores
