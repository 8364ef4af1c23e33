"""Drawing from what a threshold keeps: the inverse of the cumulated probabilities, in the order of the vocabulary.

Probabilities count as whole multiples of 2^-60. Sums of integers are the same in any order, so that however the work is
split, on whatever device, the same probabilities, threshold and number give the same token.
"""

import torch
from torch import Tensor

WHOLE = 1 << 60  # the mass of a distribution


def masses(probs: Tensor) -> Tensor:
    """float32 probabilities as int64 multiples of 2^-60, rounded down. Exact from 2^-37 on."""
    return (probs * float(WHOLE)).long()


def pick(probs: Tensor, least: Tensor, numbers: Tensor) -> Tensor:
    """The token at the point `numbers[r]` of the way through the mass of the tokens that row r keeps.

    Args:
        probs: [R, vocabulary] float32.
        least: [R] float32: tokens with probs >= least are kept.
        numbers: [R] float64 in [0, 1 - 2^-53].

    Returns:
        [R] int64. Of a row that is not a distribution (not a number), any token.
    """
    kept = masses(probs).masked_fill(probs < least.unsqueeze(1), 0)
    cumulative = kept.cumsum(dim=-1)
    # Below the total for all that it is rounded: 1 - 2^-53 is half a step of a double or more below 1.
    point = (numbers * cumulative[:, -1].double()).long()
    found = torch.searchsorted(cumulative, point.unsqueeze(1), right=True).squeeze(1)
    return found.clamp(max=probs.shape[1] - 1)
