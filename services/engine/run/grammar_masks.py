"""Masks of the tokens that grammars allow next, computed on the host while the device computes the step.

All sequences of a step wait for its masks. So one mask has MASK_S of a core, and all of a step together have as much of
each core that computes them: beyond that, the slowest answers end, with the token that these masks were for, unless it
is the first time. A grammar takes a little longer each time, as the library bounds what can come at once by counting
(shared/grammar/compiler.py), so no step's masks take much more than that. Nor may they take nearly as much step after
step: beyond what is usual, they have LASTING_S of each core.
"""

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from llguidance import LLExecutor
from numpy.typing import NDArray

from services.engine.schedule.grammar_state import GrammarState

# Time for which the caller computes before it wakes threads for the masks that are left. Waking them may take as long.
ALONE_S = 0.0015
MASK_S = 0.1  # of a core. Schemas in use take a hundredth of it (docs/structured-output.md)
SPARED = 2  # times as much as they may is what the masks of a step may take where it is the first time
USUAL_S = 0.001  # of a core, for a mask. Nearly all of schemas in use take less
LASTING_S = 1.0  # of each core, for what the masks of steps in a row take beyond the usual
SLOW_S = 0.05  # by the wall, for the masks of a step
TIMED_STEPS = 100  # after a slow one: a grammar may be slow now and then
_TOO_SLOW = f"to compute which tokens it allows next takes more than {MASK_S:g} s; it may match in too many ways"
_SLOWEST = (
    "to compute which tokens it allows next takes {:.2g} s, the longest beside other answers'; all of a step have "
    f"{MASK_S:g} s of each core"
)
_LASTING = (
    "to compute which tokens it allows next takes {:.2g} s, step after step, the longest beside other answers'; beyond "
    f"{USUAL_S:g} s for each, all of them have {LASTING_S:g} s of each core"
)

Masks = NDArray[np.uint8]  # [G, bytes]: bit b of byte i is token 8 i + b


class GrammarMasks:
    """Computation of masks: quick ones by the caller, then by parallel threads.

    The library's threads are faster, and ours know what each mask takes: these compute in the steps after a slow one.
    """

    def __init__(self, vocab_size: int, threads: int) -> None:
        self._words = -(-vocab_size // 32)
        self._threads = threads
        self._executor = LLExecutor(threads)
        self._timed = ThreadPoolExecutor(threads, "mask")
        self._timed_steps = 0
        self._beyond_usual = 0.0  # seconds of a core, in the timed steps

    def compute(self, states: Sequence[GrammarState]) -> Masks:
        """Return the mask of each state. Of one whose grammar fails, which its `failure` says, only end tokens.

        States whose masks have taken too long fail, too.
        """
        masks = np.empty((len(states), self._words), np.uint32)
        address, length = masks.ctypes.data, self._words * 4

        def compute(row: int) -> None:
            states[row].matcher.unsafe_compute_mask_ptr(address + row * length, length)

        # Not of the wall: a machine that is busy makes no grammar complex.
        def timed(row: int) -> float:
            began = time.thread_time()
            compute(row)
            return time.thread_time() - began

        began, busy, done = time.perf_counter(), time.thread_time(), 0
        while done < len(states) and (not done or time.perf_counter() < began + ALONE_S):
            compute(done)
            done += 1
        took = [0.0] * (done - 1) + [time.thread_time() - busy]  # the last one's: those before were quick
        left = range(done, len(states))
        if left and self._timed_steps:
            took.extend(self._timed.map(timed, left))
        elif left:
            jobs = [(states[row].matcher, row) for row in left]
            self._executor.unsafe_compute_mask_ptr(jobs, address, length, len(states))
        self._end_slowest(states, took)
        is_slow = time.perf_counter() - began >= SLOW_S
        self._timed_steps = TIMED_STEPS if is_slow else max(0, self._timed_steps - 1)
        if not self._timed_steps:
            self._beyond_usual = 0.0
        return masks.view(np.uint8)

    def _end_slowest(self, states: Sequence[GrammarState], took: list[float]) -> None:
        """End answers until the masks of the others take less than they may.

        Args:
            took: seconds of a core, of the first states: those that are known.
        """
        most, usual, in_all, slowest = MASK_S * self._threads, USUAL_S * len(took), sum(took), list[int]()
        self._beyond_usual = max(0.0, self._beyond_usual + in_all - usual)
        is_lasting = self._beyond_usual >= LASTING_S * self._threads
        allowed, rest = min(most, usual) if is_lasting else most, in_all
        for row in sorted(range(len(took)), key=lambda row: -took[row]):
            if took[row] < MASK_S and rest < allowed:
                break
            slowest.append(row)
            rest -= took[row]
        # The first mask of an answer may be slower than all that follow, and many answers may begin at once.
        again = [states[row].was_slow for row in slowest]
        for row, before in zip(slowest, again, strict=True):
            states[row].note_slow()
            if took[row] >= MASK_S:
                states[row].give_up(_TOO_SLOW)
            elif before or in_all >= SPARED * most:
                states[row].give_up((_LASTING if is_lasting else _SLOWEST).format(took[row]))
                if is_lasting:
                    self._beyond_usual = 0.0  # what goes on is usual
            else:
                continue
            in_all -= took[row]


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
