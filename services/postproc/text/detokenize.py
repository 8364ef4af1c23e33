"""Tokens to text, one by one, never half a character.

A token is some bytes of UTF-8. Bytes that may still become a character are held back; bytes that cannot become one
any more turn into U+FFFD, exactly where bytes.decode("utf-8", "replace") of the whole would put it.
"""

from codecs import utf_8_decode
from collections.abc import Mapping
from typing import Protocol

THINK_END = "</think>"
CALL_OPEN = "<tool_call>"
CALL_CLOSE = "</tool_call>"


class TokenBytes(Protocol):
    """The part of a tokenizer (shared.model.tokenizer.Tokenizer) that postproc needs."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def control(self) -> Mapping[str, int]: ...

    def token_id(self, text: str) -> int | None: ...

    def token_bytes(self, token_id: int) -> bytes: ...


class Vocabulary:
    """The bytes of every token, and which tokens are markers.

    `call_markers` are the tool-call markers that are tokens, by id; `spelled_markers` those the vocabulary lacks.
    `plain` maps the tokens that no parser has to look at to their text: whole characters, no newline at either end (a
    parser may have to hold a newline back), no marker. Most tokens of an answer are plain.
    """

    def __init__(self, tokenizer: TokenBytes) -> None:
        self._bytes = [tokenizer.token_bytes(token) for token in range(tokenizer.vocab_size)]
        self._names = {token: name.encode() for name, token in tokenizer.control.items()}
        self.think_end = tokenizer.token_id(THINK_END)
        ids = {marker: tokenizer.token_id(marker) for marker in (CALL_OPEN, CALL_CLOSE)}
        self.call_markers = {token: marker for marker, token in ids.items() if token is not None}
        self.spelled_markers = tuple(marker for marker, token in ids.items() if token is None)
        self.plain: dict[int, str] = {}
        for token, data in enumerate(self._bytes):
            text = data.decode("utf-8", "ignore")
            whole = bool(text) and text.encode() == data and text == text.strip("\n")
            if whole and token != self.think_end and token not in self.call_markers:
                self.plain[token] = text

    def bytes_of(self, token: int) -> bytes:
        """Return the bytes that a token adds to an answer.

        None for special tokens and for ids beyond the vocabulary, which a model whose embedding is padded can produce.
        """
        return self._bytes[token] if token < len(self._bytes) else b""

    def bytes_or_name_of(self, token: int) -> bytes:
        """Return the same, and the name of a special token."""
        return self.bytes_of(token) or self._names.get(token, b"")


class Detokenizer:
    """The text of one answer so far, up to the last whole character."""

    __slots__ = ("_incomplete",)

    def __init__(self) -> None:
        self._incomplete = b""  # at most three bytes: the beginning of a character

    @property
    def idle(self) -> bool:
        """True if no character is incomplete."""
        return not self._incomplete

    def decode(self, data: bytes) -> str:
        """Append bytes and return the text that they complete."""
        data = self._incomplete + data
        text, used = utf_8_decode(data, "replace", False)
        self._incomplete = data[used:]
        return text

    def flush(self) -> str:
        """Return U+FFFD for an incomplete character, when no byte can follow, else nothing."""
        text, self._incomplete = self._incomplete.decode("utf-8", "replace"), b""
        return text
