"""The model's dense operations."""

import torch
from torch import Tensor

from services.engine.kernels.quantize import Weight
from services.engine.kernels.reference.mlp import SwiGLU
from services.engine.kernels.triton.attention.qkv import rotate
from services.engine.kernels.triton.dense.rms_norm import add_norm
from services.engine.kernels.triton.dense.silu_mul import silu_mul
from services.engine.kernels.triton.invariant.linear import linear


def qkv(
    x: Tensor, weight: Weight, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, slots: Tensor,
    query: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """See the reference. All but `x` contiguous, and so is the result."""
    kv_heads, dim = keys.shape[2:]
    if query is None:
        query = torch.empty(len(x), len(weight) // dim - 2 * kv_heads, dim, dtype=x.dtype, device=x.device)
    rotate(linear(x, weight), cos, sin, slots, query, keys, values)
    return query


def linear_add_norm(x: Tensor, weight: Weight, residual: Tensor, norm: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """See the reference. `residual` contiguous."""
    return add_norm(linear(x, weight), residual, norm, eps)


def mlp_add_norm(x: Tensor, mlp: SwiGLU, residual: Tensor, norm: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """See the reference. `residual` contiguous."""
    return add_norm(swiglu(x, mlp), residual, norm, eps)


def swiglu(x: Tensor, mlp: SwiGLU) -> Tensor:
    """Return [1, N, H] of a gated block."""
    return linear(silu_mul(linear(x, mlp.gate_up), x.dtype), mlp.down)


def logits(x: Tensor, weight: Tensor) -> Tensor:
    """See the reference."""
    return linear(x, weight, dtype=torch.float32)[0]
