"""A dense block."""

from torch import Tensor

from services.engine.kernels.gpu.linear import gated_linear, partial_linear
from services.engine.kernels.gpu.rms_norm import add_norm
from services.engine.kernels.mlp import SwiGLU
from services.engine.kernels.quantize import Weight


def linear_add_norm(x: Tensor, weight: Weight, residual: Tensor, norm: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """See the reference: services.engine.kernels.linear_add_norm. `residual` contiguous."""
    return add_norm(partial_linear(x, weight), residual, norm, eps)


def mlp_add_norm(x: Tensor, mlp: SwiGLU, residual: Tensor, norm: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """See the reference: services.engine.kernels.mlp. `residual` contiguous."""
    return linear_add_norm(gated_linear(x, mlp.gate_up), mlp.down, residual, norm, eps)
