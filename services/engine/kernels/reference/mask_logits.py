"""Mask of logits by bits: minus infinity where a grammar does not allow a token."""

from functools import cache

import torch
from torch import Tensor


def mask_logits(logits: Tensor, rows: Tensor, masks: Tensor) -> None:
    """Write minus infinity to the logits of some rows where their mask has no bit.

    Args:
        logits: [R, vocabulary] float32, contiguous, changed in place.
        rows: [G] int64, distinct.
        masks: [G, bytes] uint8, contiguous: bit b of byte i is token 8 i + b; at least as many bits as the vocabulary.
    """
    allowed = torch.nn.functional.embedding(masks.int(), _bits(masks.device)).flatten(1)
    logits[rows] = logits[rows].masked_fill_(~allowed[:, : logits.shape[1]], float("-inf"))


@cache
def _bits(device: torch.device) -> Tensor:
    """Return [256, 8] bool: which bits of a byte are set."""
    return ((torch.arange(256).unsqueeze(1) >> torch.arange(8)) & 1 == 1).to(device)
