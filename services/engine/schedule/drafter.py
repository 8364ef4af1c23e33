"""Drafter: guesses the next tokens of a sequence from what followed the same tokens before, in its prompt or answer.

A guess is never trusted: the scheduler has the model draw each token as if there were none, and goes on from a guess
only where the same token was drawn. So nothing here can change an answer.
"""

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]

CHANCE = 0.4  # that a guess is right, before any was checked
FEW, MANY = 4, 16  # a check counts for one in so many, at first and after more than that
GROUPS = 5  # of lengths: 1, 2 to 3, 4 to 7, 8 to 15, and all longer ones
BULK = 64  # new tokens from which on they are indexed together, unchecked
_ADD, _SPREAD, _MASK = 0x9E3779B97F4A7C15, 0xD1B54A32D192ED03, (1 << 64) - 1


class Drafter:
    """Follower of one sequence's tokens, which keeps a place before their end behind which they seem to repeat.

    The `length` tokens before the place are the same as the last `length` ones. A token that is the one at the place
    moves both on. Where another comes, the last `ngram` tokens are looked up in a table by hash, of fixed size, which
    has the end of their last occurrence: constant time a token, 8 bytes a token at most.

    Each guess of a next token is checked when that token is known, whether it was used or not. So how often guesses
    are right, by the length of the match, is known before the first one is used.
    """

    def __init__(self, tokens: Ids, ngram: int) -> None:
        """Begin with no token.

        Args:
            tokens: with room for all that will ever come; only those that `follow` was told of are read.
        """
        self._tokens = tokens
        self._ngram = ngram
        bits = max(len(tokens).bit_length(), 4)
        self._shift = 64 - bits
        self._ends = np.zeros(1 << bits, np.int32)  # by hash, the end of its last n-gram; 0: none
        self._known = 0
        self._place = self._length = 0
        self._chances = Chances()

    def follow(self, known: int) -> None:
        """Take in the tokens up to the `known`-th."""
        if known - self._known >= BULK:
            self._skip(known - 1)
        for token in self._tokens[self._known : known].tolist():
            self._check(token)
            self._known += 1
            self._look_up()

    def guess(self, most: int, after: int = 0) -> list[tuple[int, float]]:
        """Return the next tokens, each with the chance that it and all before it are right.

        Args:
            after: tokens to leave out at the beginning, as they are being drawn.
        """
        if not self._length:
            return []
        guessed, chance = [], 1.0
        period = self._known - self._place  # the guess goes on as it began where it reaches the end of what is known
        following = self._tokens[self._place : min(self._known, self._place + after + most)].tolist()
        for step in range(after + most):
            chance *= self._chances.of(self._length + step)
            if step >= after:
                guessed.append((following[step % period], chance))
        return guessed

    def _check(self, token: int) -> None:
        if not self._length:
            return
        right = int(self._tokens[self._place]) == token
        self._chances.count(self._length, right)
        self._place, self._length = (self._place + 1, self._length + 1) if right else (0, 0)

    def _look_up(self) -> None:
        """Index the n-gram that the known tokens end in; begin a match with the one before, if there is none."""
        end, ngram = self._known, self._ngram
        if end < ngram:
            return
        last = self._tokens[end - ngram : end].tolist()
        key = 0
        for token in last:
            key = (key * _SPREAD + token + _ADD) & _MASK
        key = (key * _SPREAD & _MASK) >> self._shift
        before = int(self._ends[key])
        self._ends[key] = end
        if not self._length and before and self._tokens[before - ngram : before].tolist() == last:
            self._place, self._length = before, ngram

    def _skip(self, known: int) -> None:
        """Index the n-grams that end in the tokens up to the `known`-th, and forget the match."""
        self._place = self._length = 0
        ends = np.arange(max(self._ngram, self._known + 1), known + 1)
        keys = np.zeros(len(ends), np.uint64)
        for before in range(self._ngram, 0, -1):
            keys = keys * np.uint64(_SPREAD) + self._tokens[ends - before].astype(np.uint64) + np.uint64(_ADD)
        # Of those with one key the last remains.
        self._ends[(keys * np.uint64(_SPREAD)) >> np.uint64(self._shift)] = ends
        self._known = known


class Chances:
    """Shares of guesses that were right, by the length of the match behind them."""

    def __init__(self) -> None:
        self._shares = [CHANCE] * GROUPS
        self._checked = [0] * GROUPS

    def of(self, length: int) -> float:
        return self._shares[_group(length)]

    def count(self, length: int, right: bool) -> None:
        """Count a guess. Longer matches than have ever been checked are taken to be as good as this one."""
        group = _group(length)
        share = self._shares[group]
        share += (right - share) / min(FEW + self._checked[group], MANY)
        self._checked[group] += 1
        reach = 1 if any(self._checked[group + 1 :]) else GROUPS - group
        self._shares[group : group + reach] = [share] * reach


def _group(length: int) -> int:
    return min(length.bit_length(), GROUPS) - 1
