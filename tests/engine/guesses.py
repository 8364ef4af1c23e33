"""Guesses for the engine's tests: of tokens that come anyway, and wrong here and there."""

import random
from collections.abc import Callable, Iterable, Iterator
from collections.abc import Sequence as Ordered
from contextlib import contextmanager
from unittest.mock import patch

from engine_cases import VOCAB, continuation

from services.engine.schedule import speculation
from services.engine.schedule.drafter import Ids
from services.engine.schedule.speculation import Speculation

GUESSING = Speculation(most=5, ngram=2, max_batch=8)
Continue = Callable[[Ordered[int], int], list[int]]  # so many tokens that follow these


class Guesses:
    """Stands in for a Drafter that is sure of itself."""

    def __init__(self, tokens: Ids, follow_up: Continue, wrong: int) -> None:
        self._tokens, self._follow_up, self._wrong = tokens, follow_up, wrong
        self._known = 0

    def follow(self, known: int) -> None:
        assert known >= self._known
        self._known = known

    def guess(self, most: int, after: int = 0) -> list[tuple[int, float]]:
        right = self._follow_up(self._tokens[: self._known].tolist(), after + most)
        guessed = [
            (token + 1) % VOCAB if self._wrong and (self._known + step) % self._wrong == 0 else token
            for step, token in enumerate(right)
        ]
        return [(token, 1.0) for token in guessed[after:]]


@contextmanager
def guessing(follow_up: Continue = continuation, wrong: int = 3) -> Iterator[None]:
    """Guess by `follow_up` (the sum model, if it is left out); one of `wrong` guesses is wrong, none if that is 0."""
    with patch.object(speculation, "Drafter", lambda tokens, ngram: Guesses(tokens, follow_up, wrong)):
        yield


def among(answers: Iterable[list[int]]) -> Continue:
    """Return what follows tokens in those whole texts, of prompt and answer, that begin with them; of the first one."""
    texts = list(answers)

    def follow_up(known: Ordered[int], count: int) -> list[int]:
        return next((text[len(known) :][:count] for text in texts if text[: len(known)] == list(known)), [])

    return follow_up


class Careless:
    """Stands in for a Drafter that is sure of itself and is right by chance, where it is."""

    def __init__(
        self, tokens: Ids, follow_up: Continue, right: float, rng: random.Random, strange: Ordered[int]
    ) -> None:
        self._tokens, self._follow_up, self._right, self._rng, self._strange = tokens, follow_up, right, rng, strange
        self._known = 0

    def follow(self, known: int) -> None:
        assert known >= self._known
        self._known = known

    def guess(self, most: int, after: int = 0) -> list[tuple[int, float]]:
        known = self._tokens[: self._known].tolist()
        count = after + self._rng.randint(0, most)
        following = self._follow_up(known, count)
        following += self._rng.choices([*self._strange, *known], k=count - len(following))
        return [(self._instead(token, known), 1.0) for token in following[after:]]

    def _instead(self, token: int, known: Ordered[int]) -> int:
        return (
            token if self._rng.random() < self._right else self._rng.choice([*self._strange, self._rng.choice(known)])
        )


@contextmanager
def careless(
    answers: Iterable[list[int]], right: float, rng: random.Random, strange: Ordered[int] = ()
) -> Iterator[None]:
    """Guess what follows in those texts, each token with this chance, and else one of `strange` or of the text."""
    follow_up = among(answers)
    with patch.object(speculation, "Drafter", lambda tokens, ngram: Careless(tokens, follow_up, right, rng, strange)):
        yield
