"""Root-mean-square normalisation in one pass over each row."""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _rms_norm_kernel(
    x_ptr, residual_ptr, weight_ptr, out_ptr, total_ptr, H, eps, ADD: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64) * H
    column = tl.arange(0, BLOCK)
    inside = column < H
    x = tl.load(x_ptr + row + column, inside, 0.0)
    if ADD:
        x = (x.to(tl.float32) + tl.load(residual_ptr + row + column, inside, 0.0).to(tl.float32)).to(x.dtype)
        tl.store(total_ptr + row + column, x, inside)
    exact = x.to(tl.float32)
    inverse = tl.rsqrt(tl.sum(exact * exact, 0) / H + eps)
    weight = tl.load(weight_ptr + column, inside, 0.0).to(tl.float32)
    normed = (exact * inverse).to(x.dtype).to(tl.float32)
    tl.store(out_ptr + row + column, (normed * weight).to(x.dtype), inside)


def _launch(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    rows, width = x.shape
    out = torch.empty_like(x)
    total = out if residual is None else torch.empty_like(x)
    block = triton.next_power_of_2(width)
    source = x if residual is None else residual
    _rms_norm_kernel[(rows,)](
        x,
        source,
        weight,
        out,
        total,
        width,
        eps,
        ADD=residual is not None,
        BLOCK=block,
        num_warps=4 if block < 8192 else 8,
    )
    return out, total


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See the reference: services.engine.kernels.rms_norm. `x` contiguous."""
    return _launch(x, None, weight, eps)[0]


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """See the reference. `x` and `residual` contiguous."""
    return _launch(x, residual, weight, eps)
