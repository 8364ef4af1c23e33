"""Sampling of a token among those that a threshold keeps: the inverse of the cumulative probabilities, in the order of
the vocabulary.

Probabilities count as whole multiples of 2^-60. Sums of integers do not depend on order, so however the work is split,
on whatever device, the same probabilities, threshold and random number give the same token.
"""

import torch
from torch import Tensor

WHOLE = 1 << 60  # the mass of a distribution


def masses(probs: Tensor) -> Tensor:
    """Convert float32 probabilities to int64 multiples of 2^-60, rounded down. Exact from 2^-37 on."""
    return (probs * float(WHOLE)).long()


def pick(probs: Tensor, least: Tensor, numbers: Tensor) -> Tensor:
    """Return the token at the point `numbers[r]` of the way through the mass of the tokens that row r keeps.

    Args:
        probs: [R, vocabulary] float32.
        least: [R] float32: tokens with probs >= least are kept.
        numbers: [R] float64 in [0, 1 - 2^-53].

    Returns:
        [R] int64; for a row with NaN, any token.
    """
    kept = masses(probs).masked_fill(probs < least.unsqueeze(1), 0)
    cumulative = kept.cumsum(dim=-1)
    # Below the total in spite of rounding: 1 - 2^-53 is half a step of a double or more below 1.
    point = (numbers * cumulative[:, -1].double()).long()
    found = torch.searchsorted(cumulative, point.unsqueeze(1), right=True).squeeze(1)
    return found.clamp(max=probs.shape[1] - 1)
