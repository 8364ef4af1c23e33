"""Dense block: a SwiGLU, added to the residual stream, normed for the next block."""

from dataclasses import dataclass

from torch import Tensor

from services.engine.kernels.quantize import Weight
from services.engine.kernels.reference.linear import linear
from services.engine.kernels.reference.rms_norm import add_rms_norm
from services.engine.kernels.reference.silu_mul import silu_mul


@dataclass(frozen=True, slots=True)
class SwiGLU:
    """Weights of down(silu(gate x) * up x)."""

    gate_up: Weight  # [2 I, H]: gate rows, then up rows
    down: Weight  # [H, I]


def swiglu(x: Tensor, mlp: SwiGLU) -> Tensor:
    """Apply the SwiGLU: [N, H] to [N, H]."""
    return linear(silu_mul(linear(x, mlp.gate_up)), mlp.down)


def mlp_add_norm(x: Tensor, mlp: SwiGLU, residual: Tensor, norm: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Apply `add_rms_norm` to `swiglu`. An implementation may leave out the rounding to x's dtype in between.

    Args:
        x, residual: [N, H].
        norm: [H].

    Returns:
        the norm and the new residual, each [N, H].
    """
    return add_rms_norm(swiglu(x, mlp), residual, norm, eps)
