"""Root-mean-square normalisation, alone and with the residual addition before it."""

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return x / sqrt(mean(x^2) + eps) in float32, cast to x's dtype, times weight.

    Args:
        x: [N, H].
        weight: [H].

    Returns:
        [N, H], dtype of x.
    """
    exact = x.float()
    normed = exact * torch.rsqrt(exact.square().mean(-1, keepdim=True) + eps)
    return normed.to(x.dtype) * weight


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Add a block's result to the residual stream, and norm the sum for the next block.

    Args:
        x, residual: [N, H], the same dtype. Neither is written.

    Returns:
        rms_norm(x + residual) and x + residual, each [N, H].
    """
    total = x + residual
    return rms_norm(total, weight, eps), total
