"""Projection onto the vocabulary."""

import torch.nn.functional as F
from torch import Tensor


def logits(x: Tensor, weight: Tensor) -> Tensor:
    """Return x @ weight^T as float32. An implementation may leave out the rounding to x's dtype in between.

    Args:
        x: [R, H].
        weight: [vocabulary, H], dtype of x.

    Returns:
        [R, vocabulary] float32.
    """
    return F.linear(x, weight).float()
