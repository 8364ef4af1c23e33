"""Masks of the tokens that grammars allow next, computed on the host while the device computes the step."""

from collections.abc import Sequence

import numpy as np
from llguidance import LLExecutor
from numpy.typing import NDArray

from services.engine.schedule.grammar_state import GrammarState

Masks = NDArray[np.uint8]  # [G, bytes]: bit b of byte i is token 8 i + b


class GrammarMasks:
    """Computation of masks in parallel threads of the library, without the interpreter lock."""

    def __init__(self, vocab_size: int, threads: int) -> None:
        self._words = -(-vocab_size // 32)
        self._executor = LLExecutor(threads)

    def compute(self, states: Sequence[GrammarState]) -> Masks:
        """Return the mask of each state. Of one that fails meanwhile, which its `failure` says, only end tokens."""
        masks = np.empty((len(states), self._words), np.uint32)
        jobs = [(state.matcher, row) for row, state in enumerate(states)]
        self._executor.unsafe_compute_mask_ptr(jobs, masks.ctypes.data, self._words * 4, len(states))
        return masks.view(np.uint8)


def forbid(mask: Masks, tokens: Sequence[int]) -> None:
    """Clear the bits of tokens, unless the mask has no others.

    Args:
        mask: [bytes], changed.
    """
    present = [token for token in tokens if mask[token // 8] >> token % 8 & 1]
    if not present:
        return
    cleared = mask.copy()
    for token in present:
        cleared[token // 8] &= ~np.uint8(1 << token % 8)
    if cleared.any():
        mask[:] = cleared
