"""Loops of the thinking: a model that writes the same tokens again and again has stopped thinking."""

from copy import copy

import numpy as np
from numpy.typing import NDArray

MIN_TOKENS = 48  # that the copies take together: rulers, dots and zeros are no loop


class LoopDetector:
    """Follower of a text that ends in `repeats` copies of the same n-gram, of `longest` tokens at most.

    For each n it keeps how many tokens in a row were the same as n tokens before. That is a function of the tokens, so
    it is the same in an engine that takes the request over.
    """

    def __init__(self, repeats: int, longest: int) -> None:
        """Begin with no token. `repeats` is at least 2, `longest` at least 1."""
        lengths = np.arange(1, longest + 1)
        self._needed = np.maximum(repeats * lengths, MIN_TOKENS) - lengths  # tokens that repeat, besides the first copy
        self._same = np.zeros(longest, np.int64)  # [longest]
        self._last: NDArray[np.int64] = np.full(longest, -1, np.int64)  # the last tokens, the newest first
        self.found = False

    def copy(self) -> "LoopDetector":
        copied = copy(self)
        copied._same, copied._last = self._same.copy(), self._last.copy()
        return copied

    def add(self, token: int) -> None:
        """Append a token."""
        self._same += 1
        self._same *= self._last == token
        self._last[1:] = self._last[:-1]
        self._last[0] = token
        self.found = bool((self._same >= self._needed).any())
