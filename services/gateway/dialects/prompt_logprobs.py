"""Log-probabilities of a prompt's tokens, with the texts of the tokens."""

import sys
from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

import msgspec

from services.gateway.dialects.chat_events import LOWEST_LOGPROB
from shared.messages import PromptLogprobs, unpack_ids


class Vocabulary(Protocol):
    """The part of a tokenizer (shared.model.tokenizer.Tokenizer) that answers are written with."""

    @property
    def control(self) -> dict[str, int]: ...

    def token_bytes(self, token_id: int) -> bytes: ...


class TokenTexts:
    """Texts of tokens; of special tokens, their names."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._bytes_of = vocabulary.token_bytes
        self._names = {token: name.encode() for name, token in vocabulary.control.items()}

    def bytes_of(self, token: int) -> bytes:
        """Return the bytes of a token, which may be a part of a character, or its name."""
        return self._bytes_of(token) or self._names.get(token, b"")

    def text_of(self, tokens: Iterable[int]) -> str:
        """Return the text of tokens that follow each other."""
        return b"".join(map(self.bytes_of, tokens)).decode("utf-8", "replace")


class PromptToken(msgspec.Struct, frozen=True):
    """Token of a prompt, the log-probability and rank that the model gave it, and the most likely ones, best first."""

    token: int
    logprob: float
    rank: int
    top: Sequence[tuple[int, float]]


def prompt_tokens(prompt: Sequence[int], found: PromptLogprobs) -> Iterator[PromptToken]:
    """Yield each token of a prompt from the second on."""
    logprobs, ids, ranks = _floats(found.logprobs), unpack_ids(found.ids), unpack_ids(found.ranks)
    count, width = found.count, 1 + found.count
    for row, token in enumerate(prompt[1:]):
        values = logprobs[row * width : (row + 1) * width]
        top = zip(ids[row * count : (row + 1) * count], values[1:], strict=True)
        yield PromptToken(token, values[0], ranks[row], tuple(top))


def prompt_logprobs_json(
    prompt: Sequence[int] | None, found: PromptLogprobs | None, texts: TokenTexts
) -> list[dict[str, Any] | None] | None:
    """Return vLLM's `prompt_logprobs`, by id; the first token has none. None from an engine of an older release."""
    if prompt is None or found is None:
        return None
    return [None, *(_by_id(one, texts) for one in prompt_tokens(prompt, found))]


def _by_id(one: PromptToken, texts: TokenTexts) -> dict[str, Any]:
    ranked = {token: (logprob, rank) for rank, (token, logprob) in enumerate(one.top, 1)}
    return {
        str(token): {
            "logprob": max(logprob, LOWEST_LOGPROB),
            "rank": rank,
            "decoded_token": texts.text_of([token]),
        }
        for token, (logprob, rank) in ({one.token: (one.logprob, one.rank)} | ranked).items()
    }


def _floats(data: bytes) -> "array[float]":
    values = array("f", data)
    if sys.byteorder == "big":
        values.byteswap()
    return values
