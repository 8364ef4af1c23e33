"""Masks of the tokens that grammars allow next, computed on the host while the device computes the step."""

import time
from collections.abc import Sequence

import numpy as np
from llguidance import LLExecutor
from numpy.typing import NDArray

from services.engine.schedule.grammar_state import GrammarState

# Time for which the caller computes before it wakes threads for the masks that are left. Waking them may take as long.
ALONE_S = 0.0015

Masks = NDArray[np.uint8]  # [G, bytes]: bit b of byte i is token 8 i + b


class GrammarMasks:
    """Computation of masks: quick ones by the caller, then by parallel threads of the library."""

    def __init__(self, vocab_size: int, threads: int) -> None:
        self._words = -(-vocab_size // 32)
        self._executor = LLExecutor(threads)

    def compute(self, states: Sequence[GrammarState]) -> Masks:
        """Return the mask of each state. Of one that fails meanwhile, which its `failure` says, only end tokens."""
        masks = np.empty((len(states), self._words), np.uint32)
        address, length = masks.ctypes.data, self._words * 4
        deadline = time.perf_counter() + ALONE_S
        done = 0
        while done < len(states) and time.perf_counter() < deadline:
            states[done].matcher.unsafe_compute_mask_ptr(address + done * length, length)
            done += 1
        if done < len(states):
            jobs = [(state.matcher, row) for row, state in enumerate(states) if row >= done]
            self._executor.unsafe_compute_mask_ptr(jobs, address, length, len(states))
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
