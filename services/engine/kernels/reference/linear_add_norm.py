"""Output projection of attention, addition to the residual stream, norm for the next block."""

from torch import Tensor

from services.engine.kernels.quantize import Weight
from services.engine.kernels.reference.linear import linear
from services.engine.kernels.reference.rms_norm import add_rms_norm


def linear_add_norm(x: Tensor, weight: Weight, residual: Tensor, norm: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Apply `add_rms_norm` to `linear`. An implementation may leave out the rounding to x's dtype in between.

    Args:
        x: [N, in].
        weight: [H, in].
        residual: [N, H].
        norm: [H].

    Returns:
        the norm and the new residual, each [N, H].
    """
    return add_rms_norm(linear(x, weight), residual, norm, eps)
