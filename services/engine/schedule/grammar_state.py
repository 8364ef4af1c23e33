"""Position of an answer in the grammar that it must follow: a function of the grammar and the tokens so far."""

from llguidance import LLMatcher

from shared.errors import Failure, internal


class GrammarState:
    """Grammar of one sequence, after the tokens that were appended since its thinking ended."""

    __slots__ = ("_failure", "_origin", "_was_slow", "matcher")

    def __init__(self, matcher: LLMatcher, origin: "GrammarState | None" = None) -> None:
        """
        Args:
            matcher: at the grammar's beginning; this state's own.
            origin: of which this is a copy.
        """
        self.matcher = matcher
        self._origin = origin
        self._failure: Failure | None = None
        self._was_slow = False

    @property
    def failure(self) -> Failure | None:
        """Why the answer cannot go on: the grammar is too complex after these tokens, or does not allow them."""
        if self._failure is None and self.matcher.is_error():
            self._failure = internal(f"The grammar failed: {self.matcher.get_error():.300}", "grammar_error").failure
        return self._failure

    @property
    def was_slow(self) -> bool:
        """True if a mask of the answer was among the slowest of a step whose masks took too long."""
        return self._was_slow if self._origin is None else self._origin.was_slow

    def note_slow(self) -> None:
        """Note that one was."""
        if self._origin is None:
            self._was_slow = True
        else:
            self._origin.note_slow()

    def give_up(self, reason: str) -> None:
        """Let the answer end here, by a failure; of a copy, the answer that it is of."""
        self._failure = internal(f"The grammar failed: {reason}", "grammar_error").failure
        if self._origin is not None:
            self._origin.give_up(reason)

    @property
    def complete(self) -> bool:
        """True if the answer is whole and nothing but an end token may follow."""
        return self.matcher.is_stopped()

    def allowed(self, tokens: list[int]) -> int:
        """Return how many of the tokens could follow one after the other."""
        return self.matcher.validate_tokens(tokens) if tokens and not self.matcher.is_stopped() else 0

    def copy(self) -> "GrammarState":
        return GrammarState(self.matcher.deep_copy(), self)

    def advance(self, token: int) -> None:
        """Append a token."""
        if not self.matcher.is_stopped():
            self.matcher.consume_token(token)
