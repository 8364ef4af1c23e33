"""Log-probabilities of a prompt's own tokens, put together as its chunks are computed."""

import msgspec
import numpy as np
from numpy.typing import NDArray

from shared.messages import PromptLogprobs


class ScoredRows(msgspec.Struct, frozen=True):
    """Scores of `n` tokens of a prompt that follow each other."""

    logprobs: NDArray[np.float32]  # [n, 1 + count]: of the token itself, and of the most likely ones, best first
    ids: NDArray[np.int64]  # [n, count] these
    ranks: NDArray[np.int64]  # [n] of the token itself


class PromptScores:
    """Scores of the tokens of one prompt from the second on. They are a function of the prompt: a preempted sequence
    keeps those that it has."""

    def __init__(self, prompt_len: int, count: int) -> None:
        self.known = 0  # tokens from the second on that are scored
        self._count = count
        tokens = prompt_len - 1
        self._logprobs = np.empty((tokens, 1 + count), "<f4")
        self._ids = np.empty((tokens, count), "<u4")
        self._ranks = np.empty(tokens, "<u4")

    @property
    def complete(self) -> bool:
        return self.known == len(self._ranks)

    def add(self, start: int, rows: ScoredRows) -> None:
        """Append scores, which those of token `start` and everything behind it are."""
        assert start == self.known, "prompts are scored in order"
        stop = start + len(rows.ranks)
        self._logprobs[start:stop] = rows.logprobs
        self._ids[start:stop] = rows.ids
        self._ranks[start:stop] = rows.ranks
        self.known = stop

    def packed(self) -> PromptLogprobs:
        return PromptLogprobs(self._count, self._logprobs.tobytes(), self._ids.tobytes(), self._ranks.tobytes())
