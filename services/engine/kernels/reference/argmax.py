"""Greedy sampling."""

from torch import Tensor


def argmax(logits: Tensor) -> Tensor:
    """Return the index of each row's largest value, the first of equals.

    Args:
        logits: [R, vocabulary] float32, contiguous.

    Returns:
        [R] int64; for a row with NaN, any index.
    """
    return logits.argmax(dim=-1)
