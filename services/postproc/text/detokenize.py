"""Tokens to text, one by one, never half a character.

A token is some bytes of UTF-8. Bytes that may still become a character are held back; bytes that cannot become one
any more turn into U+FFFD, exactly where bytes.decode("utf-8", "replace") of the whole would put it.
"""

from codecs import utf_8_decode
from typing import Protocol

THINK_END = "</think>"
CALL_OPEN = "<tool_call>"
CALL_CLOSE = "</tool_call>"


class TokenBytes(Protocol):
    """What is needed of a tokenizer (shared.model.tokenizer.Tokenizer)."""

    @property
    def vocab_size(self) -> int: ...

    def token_id(self, text: str) -> int | None: ...

    def token_bytes(self, token_id: int) -> bytes: ...


class Vocabulary:
    """The bytes of every token, and which tokens are markers.

    `call_markers` are the tool-call markers that are tokens, by id; `spelled_markers` those the vocabulary lacks.
    `plain` maps the tokens that need no thought to their text: whole characters, no newline at either end (a parser
    may have to hold a newline back), no marker. Most tokens of an answer are plain.
    """

    def __init__(self, tokenizer: TokenBytes) -> None:
        self._bytes = [tokenizer.token_bytes(token) for token in range(tokenizer.vocab_size)]
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
        """The bytes a token adds to an answer; none for specials and for ids the tokenizer does not know, which a
        model whose embedding is padded can produce."""
        return self._bytes[token] if token < len(self._bytes) else b""


class Detokenizer:
    """The text of one answer so far, up to the last whole character."""

    __slots__ = ("_rest",)

    def __init__(self) -> None:
        self._rest = b""  # at most three bytes: the beginning of a character

    @property
    def idle(self) -> bool:
        """No character has begun."""
        return not self._rest

    def push(self, data: bytes) -> str:
        """The text that these bytes complete."""
        data = self._rest + data
        text, used = utf_8_decode(data, "replace", False)
        self._rest = data[used:]
        return text

    def flush(self) -> str:
        """U+FFFD for a character that was begun, when no byte can follow."""
        text, self._rest = self._rest.decode("utf-8", "replace"), b""
        return text
