"""The most likely token."""

from torch import Tensor


def argmax(logits: Tensor) -> Tensor:
    """The place of each row's largest value, the first of equals.

    Args:
        logits: [R, vocabulary] float32, contiguous.

    Returns:
        [R] int64. Of a row with values that are no numbers, any place.
    """
    return logits.argmax(dim=-1)
