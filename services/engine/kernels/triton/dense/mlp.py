"""Dense blocks, and the output projection of attention."""

from torch import Tensor

from services.engine.kernels.quantize import Weight
from services.engine.kernels.reference.mlp import SwiGLU
from services.engine.kernels.triton.dense.linear import gated_linear, partial_linear
from services.engine.kernels.triton.dense.rms_norm import add_norm


def linear_add_norm(x: Tensor, weight: Weight, residual: Tensor, norm: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """See the reference: services.engine.kernels.reference.linear_add_norm. `residual` contiguous."""
    return add_norm(partial_linear(x, weight), residual, norm, eps)


def mlp_add_norm(x: Tensor, mlp: SwiGLU, residual: Tensor, norm: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """See the reference: services.engine.kernels.reference.mlp. `residual` contiguous."""
    return linear_add_norm(gated_linear(x, mlp.gate_up), mlp.down, residual, norm, eps)
