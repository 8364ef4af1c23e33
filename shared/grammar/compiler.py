"""Compilation of grammars for one vocabulary, within limits of time and memory."""

from collections.abc import Iterable
from typing import Protocol

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper

# The library counts its work and gives up at a limit. Far above what schemas in use need (docs/structured-output.md),
# and so low that no mask takes longer than a few steps of the model.
LIMITS = LLParserLimits(
    initial_lexer_fuel=1_000_000,
    step_lexer_fuel=200_000,
    step_max_items=50_000,
    max_lexer_states=50_000,
    max_grammar_size=500_000,
    verbose_errors=False,
)


class GrammarError(ValueError):
    """A grammar that cannot be compiled: it is malformed, asks for what the library cannot do, or is too complex."""


class Spelling(Protocol):
    """The tokens of a vocabulary: `shared.model.tokenizer.Tokenizer` has these methods."""

    @property
    def control(self) -> dict[str, int]: ...

    def token_bytes(self, token_id: int) -> bytes: ...

    def encode_text(self, text: str) -> list[int]: ...


class GrammarCompiler:
    """Compiler of grammars over the ids of one model. Safe to use from several threads."""

    def __init__(self, tokenizer: Spelling, vocab_size: int, eos_ids: Iterable[int]) -> None:
        """
        Args:
            vocab_size: of the model: the width of a mask in bits. Ids without a token are in no mask.
            eos_ids: tokens that end an answer, allowed where the grammar may end.
        """
        ids = [*eos_ids]
        self.end_ids = tuple(ids)
        wrapped = TokenizerWrapper(_Vocabulary(tokenizer, vocab_size, ids[0]))
        self._vocabulary = LLTokenizer(wrapped, eos_token=ids, slices=LLTokenizer.json_slices())

    def compile(self, text: str) -> LLMatcher:
        """Return a matcher at the beginning of the text; it releases the interpreter lock while it compiles.

        Args:
            text: a `Grammar.text`.

        Raises:
            GrammarError: it cannot be compiled.
        """
        try:
            matcher = LLMatcher(self._vocabulary, text, log_level=0, limits=LIMITS)
        except ValueError as error:
            raise GrammarError(str(error)) from None
        if matcher.is_error():
            raise GrammarError(matcher.get_error())
        return matcher


class _Vocabulary:
    """A tokenizer as the library reads one.

    Control tokens are special tokens: no text matches them, only their names in a grammar.
    """

    bos_token_id = None

    def __init__(self, tokenizer: Spelling, vocab_size: int, eos_id: int) -> None:
        self._tokenizer = tokenizer
        control = {token: text for text, token in tokenizer.control.items() if token < vocab_size}
        self.eos_token_id = eos_id
        self.special_token_ids = sorted(control)
        self.tokens = [
            control[token].encode() if token in control else tokenizer.token_bytes(token) for token in range(vocab_size)
        ]
        self._bytes = {data[0]: token for token, data in enumerate(self.tokens) if len(data) == 1}

    def __call__(self, text: bytes) -> list[int]:
        """Return the ids of text that a grammar forces: its bytes' where the others spell another text."""
        ids = self._tokenizer.encode_text(text.decode())
        spelled = b"".join(map(self._tokenizer.token_bytes, ids))
        return ids if spelled == text else [self._bytes[byte] for byte in text if byte in self._bytes]
