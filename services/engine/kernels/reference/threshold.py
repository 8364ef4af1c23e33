"""Threshold of top_k and top_p: tokens at least as likely are kept, so equally likely tokens stay or go together.

Two exact ways to the same set: `threshold` sorts, and is the definition; `threshold_by_search` bisects.
"""

import torch
from torch import Tensor

from services.engine.kernels.reference.pick import WHOLE, masses

_ONE = 0x3F800000  # the bits of 1.0: of floats that are not negative, the larger has the larger bits
_NO_LIMIT = torch.iinfo(torch.int64).max


def threshold(probs: Tensor, floor: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """Return a value such that row r keeps the tokens with probs >= it, which are the following.

    Of the tokens that are not below floor[r], top_k keeps those with fewer than top_k[r] tokens above them. Of these,
    whose mass is S (1 without top_k), top_p keeps those with a mass below top_p[r] * S above them.

    Args:
        probs: [R, vocabulary] float32, rows of sum 1.
        floor: [R] float32, at most the row's largest.
        top_k: [R] int64, 0: off.
        top_p: [R] float64, above 0; from 1 on: off.

    Returns:
        [R] float32: any of the values that separate the same two sets.
    """
    ordered = probs.sort(dim=-1, descending=True).values
    mass = masses(ordered)
    # The number of tokens above each; equals share the number of the first of them.
    above = torch.searchsorted(-ordered, -ordered)
    k = top_k.unsqueeze(1)
    kept = (ordered >= floor.unsqueeze(1)) & ((k <= 0) | (above < k))
    limit = mass_limit(top_k, top_p, mass.masked_fill(~kept, 0).sum(dim=-1)).unsqueeze(1)
    kept &= (mass.cumsum(dim=-1) - mass).gather(1, above) < limit
    return ordered.masked_fill(~kept, torch.inf).amin(dim=-1)


def threshold_by_search(probs: Tensor, floor: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """Compute `threshold` without a sort: as many passes over the row as a float has bits."""
    bits, mass = probs.view(torch.int32), masses(probs)
    least = torch.maximum(
        floor.view(torch.int32), _search(bits, torch.ones_like(mass), top_k.masked_fill(top_k <= 0, _NO_LIMIT))
    )
    kept = mass.masked_fill(bits < least.unsqueeze(1), 0).sum(dim=-1)
    return torch.maximum(least, _search(bits, mass, mass_limit(top_k, top_p, kept))).view(torch.float32)


def mass_limit(top_k: Tensor, top_p: Tensor, kept: Tensor) -> Tensor:
    """Return [R] int64: top_p keeps a token if the mass above it is below this.

    Args:
        kept: [R] int64, the mass that top_k keeps. Without top_k the share is one of the whole, with min_p or without.
    """
    limit = (top_p * kept.masked_fill(top_k <= 0, WHOLE).double()).ceil().long()
    return limit.masked_fill(top_p >= 1, _NO_LIMIT)


def _search(bits: Tensor, measure: Tensor, limit: Tensor) -> Tensor:
    """Return [R] int32: the smallest bits above which less than `limit` of `measure` lies."""
    low = torch.zeros(len(bits), dtype=torch.int32, device=bits.device)
    high = torch.full_like(low, _ONE)
    for _ in range(_ONE.bit_length()):
        middle = (low + high) // 2
        fewer = measure.masked_fill(bits <= middle.unsqueeze(1), 0).sum(dim=-1) < limit
        low, high = low.where(fewer, torch.minimum(middle + 1, high)), high.where(~fewer, middle)
    return low
