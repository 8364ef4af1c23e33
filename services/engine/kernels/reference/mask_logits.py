"""Mask of logits by bits: minus infinity where a grammar does not allow a token."""

import torch
from torch import Tensor


def bit_penalties(device: torch.device) -> Tensor:
    """Return [256, 8] float32, the table of `mask_logits`: 0 for a byte's bits that are set, else minus infinity."""
    unset = (torch.arange(256).unsqueeze(1) >> torch.arange(8)) & 1 == 0
    return torch.zeros(256, 8).masked_fill_(unset, float("-inf")).to(device)


def mask_logits(logits: Tensor, rows: Tensor, masks: Tensor, penalties: Tensor) -> None:
    """Add minus infinity to the logits of some rows where their mask has no bit.

    Args:
        logits: [R, vocabulary] float32, changed in place.
        rows: [G] int64, distinct.
        masks: [G, bytes] uint8: bit b of byte i is token 8 i + b; at least as many bits as the vocabulary.
        penalties: see `bit_penalties`.
    """
    added = torch.nn.functional.embedding(masks.int(), penalties).flatten(1)
    logits.index_add_(0, rows, added[:, : logits.shape[1]])
