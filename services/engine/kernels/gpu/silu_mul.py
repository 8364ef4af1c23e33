"""The gate of a SwiGLU, one pass."""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _silu_mul_kernel(x_ptr, out_ptr, WIDTH, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < WIDTH
    gate = tl.load(x_ptr + row * 2 * WIDTH + column, inside, 0.0)
    up = tl.load(x_ptr + row * 2 * WIDTH + WIDTH + column, inside, 0.0).to(tl.float32)
    exact = gate.to(tl.float32)
    tl.store(out_ptr + row * WIDTH + column, (exact * tl.sigmoid(exact) * up).to(gate.dtype), inside)


def silu_mul(gate_up: Tensor) -> Tensor:
    """See the reference. `gate_up` contiguous."""
    rows, double = gate_up.shape
    out = torch.empty(rows, double // 2, dtype=gate_up.dtype, device=gate_up.device)
    block = min(1024, triton.next_power_of_2(double // 2))
    _silu_mul_kernel[(rows, triton.cdiv(double // 2, block))](gate_up, out, double // 2, BLOCK=block, num_warps=4)
    return out
