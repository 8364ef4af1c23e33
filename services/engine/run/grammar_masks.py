"""Masks of the tokens that grammars allow next, computed on the host while the device computes the step.

All sequences of a step wait for its masks, so one mask has MASK_S of a core: the answer of a grammar that takes longer
ends, with the token that this mask was for. Such a grammar takes a little longer each time, as the library bounds what
can come at once by counting (shared/grammar/compiler.py), so no mask takes much more than that.
"""

import time
from collections.abc import Sequence

import numpy as np
from llguidance import LLExecutor
from numpy.typing import NDArray

from services.engine.schedule.grammar_state import GrammarState

# Time for which the caller computes before it wakes threads for the masks that are left. Waking them may take as long.
ALONE_S = 0.0015
MASK_S = 0.1  # of a core. Schemas in use take a hundredth of it (docs/structured-output.md)
_TOO_SLOW = f"to compute which tokens it allows next takes more than {MASK_S:g} s; it may match in too many ways"

Masks = NDArray[np.uint8]  # [G, bytes]: bit b of byte i is token 8 i + b


class GrammarMasks:
    """Computation of masks: quick ones by the caller, then by parallel threads of the library."""

    def __init__(self, vocab_size: int, threads: int) -> None:
        self._words = -(-vocab_size // 32)
        self._executor = LLExecutor(threads)

    def compute(self, states: Sequence[GrammarState]) -> Masks:
        """Return the mask of each state. Of one whose grammar fails, which its `failure` says, only end tokens.

        A state whose mask has taken too long fails, too. Only the caller's own time is known by mask: where threads
        were slow, all of their states are suspects, and the caller begins with these in the next steps, until it has
        computed a mask of each.
        """
        masks = np.empty((len(states), self._words), np.uint32)
        address, length = masks.ctypes.data, self._words * 4
        rows = sorted(range(len(states)), key=lambda row: not states[row].suspect)
        began, busy = time.perf_counter(), time.thread_time()
        done = 0
        while done < len(rows) and time.perf_counter() < began + ALONE_S:
            states[rows[done]].matcher.unsafe_compute_mask_ptr(address + rows[done] * length, length)
            states[rows[done]].suspect = False
            done += 1
        # Not of the wall: a machine that is busy makes no grammar complex. No mask is begun behind one that takes long.
        if done and time.thread_time() - busy >= MASK_S:
            states[rows[done - 1]].give_up(_TOO_SLOW)
        if left := rows[done:]:
            began = time.perf_counter()
            jobs = [(states[row].matcher, row) for row in left]
            self._executor.unsafe_compute_mask_ptr(jobs, address, length, len(states))
            slow = time.perf_counter() - began >= MASK_S
            if slow and not any(states[row].suspect for row in left):
                for row in left:
                    states[row].suspect = True
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
