"""Gate of a SwiGLU, in one pass."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from services.engine.kernels.triton.common.launch import pdl_options, wait_for_previous_kernel
from services.engine.kernels.triton.common.sizes import ceil_div, ceil_pow2


@triton.jit
def _silu_mul_kernel(
    parts_ptr, out_ptr, WIDTH, part_stride, PARTS: tl.constexpr, PDL: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    wait_for_previous_kernel(PDL)
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < WIDTH
    gate = tl.zeros((BLOCK,), tl.float32)
    up = tl.zeros((BLOCK,), tl.float32)
    at = parts_ptr + row * 2 * WIDTH + column
    for part in tl.static_range(PARTS):
        gate += tl.load(at + part * part_stride, inside, 0.0).to(tl.float32)
        up += tl.load(at + part * part_stride + WIDTH, inside, 0.0).to(tl.float32)
    tl.store(out_ptr + row * WIDTH + column, (gate * tl.sigmoid(gate) * up).to(out_ptr.dtype.element_ty), inside)


def silu_mul(partial: Tensor, dtype: torch.dtype) -> Tensor:
    """Apply the gate to a product that is still in parts.

    Args:
        partial: [parts, N, 2 I], contiguous: gate, then up.

    Returns:
        [N, I] of `dtype`.
    """
    parts, rows, double = partial.shape
    out = torch.empty(rows, double // 2, dtype=dtype, device=partial.device)
    # Few rows are spread over programs; of many, a thread reads 16 bytes.
    block = min(512 if rows < 512 else 1024, ceil_pow2(double // 2))
    _silu_mul_kernel[(rows, ceil_div(double // 2, block))](
        partial, out, double // 2, partial.stride(0), PARTS=parts, BLOCK=block, num_warps=4, **pdl_options(partial)
    )  # fmt: skip
    return out
