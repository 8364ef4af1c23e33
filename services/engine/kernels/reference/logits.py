"""Projection onto the vocabulary."""

from torch import Tensor

from services.engine.kernels.reference.linear import linear


def logits(x: Tensor, weight: Tensor) -> Tensor:
    """Return x @ weight^T as float32. An implementation may leave out the rounding to x's dtype in between.

    Args:
        x: [R, H].
        weight: [vocabulary, H], dtype of x.

    Returns:
        [R, vocabulary] float32.
    """
    return linear(x, weight).float()
