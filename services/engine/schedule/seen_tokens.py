"""Tokens that a sequence has had, and how often: the input of penalties."""

from copy import copy

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]


class SeenTokens:
    """Distinct tokens of prompt and answer, and how often each was generated: the input of penalties."""

    def __init__(self, prompt: Ids, capacity: int) -> None:
        distinct = np.unique(prompt)
        self._ids = np.empty(len(distinct) + capacity, np.int64)
        self._counts = np.zeros(len(distinct) + capacity, np.int64)
        self._ids[: len(distinct)] = distinct
        self._slots = {token: slot for slot, token in enumerate(distinct.tolist())}

    def add(self, token: int) -> None:
        """Count one generated token."""
        slot = self._slots.setdefault(token, len(self._slots))
        self._ids[slot] = token
        self._counts[slot] += 1

    def copy(self) -> "SeenTokens":
        """Copy, with room for one more token."""
        copied = copy(self)
        copied._slots = dict(self._slots)
        copied._ids, copied._counts = np.append(self.ids, 0), np.append(self.counts, 0)
        return copied

    @property
    def ids(self) -> Ids:
        return self._ids[: len(self._slots)]

    @property
    def counts(self) -> Ids:
        """[len(ids)] times generated; 0 for those of the prompt alone."""
        return self._counts[: len(self._slots)]
