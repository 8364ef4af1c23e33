"""Log-probabilities in the form of OpenAI's completions: lists beside each other, alternatives by their text."""

import codecs
from collections.abc import Iterable, Sequence
from typing import Any

import msgspec

from services.gateway.dialects.chat_events import LOWEST_LOGPROB
from services.gateway.dialects.prompt_logprobs import TokenTexts, prompt_tokens
from shared.messages import PromptLogprobs, ShownLogprob

_new_decoder = codecs.getincrementaldecoder("utf-8")


class Entry(msgspec.Struct, frozen=True):
    """Token of a prompt or an answer."""

    text: str
    data: bytes  # that it adds to the text
    logprob: float | None = None  # None: nothing is before it
    top: tuple[tuple[str, float], ...] | None = None  # the most likely ones, best first, and the token itself


class CompletionLogprobs:
    """The lists of one choice, part by part; offsets count from the choice's first character."""

    def __init__(self) -> None:
        self._decoder = _new_decoder("replace")
        self._chars = 0

    def add(self, entries: Iterable[Entry], ends: bool = False) -> dict[str, Any]:
        """Return the lists of the next tokens. `ends`: the text does, and a character cut off there stays one."""
        lists: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for one in entries:
            lists["tokens"].append(one.text)
            lists["token_logprobs"].append(None if one.logprob is None else max(one.logprob, LOWEST_LOGPROB))
            top = None if one.top is None else {text: max(value, LOWEST_LOGPROB) for text, value in one.top}
            lists["top_logprobs"].append(top)
            lists["text_offset"].append(self._chars)
            self._chars += len(self._decoder.decode(one.data))
        if ends:
            self._chars += len(self._decoder.decode(b"", final=True))
            self._decoder.reset()
        return lists


def prompt_entries(prompt: Sequence[int], found: PromptLogprobs | None, shown: int, texts: TokenTexts) -> list[Entry]:
    """Return the entries of a prompt, with the `shown` most likely tokens of each, of which there may be more.

    They have no log-probabilities while an update leaves engines of a release that does not compute them.
    """

    def name(token: int) -> str:
        return token_name(texts.bytes_of(token))

    first, *others = (Entry(name(token), texts.bytes_of(token)) for token in prompt)
    if found is None:
        return [first, *others]
    rated = zip(others, prompt_tokens(prompt, found), strict=True)
    return [
        first,
        *(
            Entry(
                entry.text,
                entry.data,
                one.logprob,
                (*((name(token), value) for token, value in one.top[:shown]), (entry.text, one.logprob)),
            )
            for entry, one in rated
        ),
    ]


def answer_entries(shown: Iterable[ShownLogprob]) -> list[Entry]:
    """Return the entries of an answer's tokens."""
    return [
        Entry(
            _shown_name(one.token, one.data),
            one.data,
            one.logprob,
            (
                *((_shown_name(token, data), value) for token, data, value in one.top),
                (_shown_name(one.token, one.data), one.logprob),
            ),
        )
        for one in shown
    ]


def token_name(data: bytes) -> str:
    """Return a token as a key: its text, or the bytes of one that is a part of a character, as OpenAI writes them."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def _shown_name(token: str, data: bytes) -> str:
    return token_name(data) if data else token
