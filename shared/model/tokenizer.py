"""Tokenizer: text to ids and ids to bytes. Ordinary text never encodes to control tokens.

The back end, SentencePiece or tokenizers, is what the checkpoint's files are for (shared/model/tokenizer_files.py). It
turns some spellings into control tokens on its own (SentencePiece its user-defined pieces, either one its merges). So
ordinary text is cut one character into every such spelling before a back end sees it: no fragment then spells a control
token, and the ids of the fragments spell the text.
"""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from shared.errors import CheckpointError
from shared.model.tokenizer_files import TokenTable, load_tokens

# What prompts and parsers cannot do without. Tool tokens are not here: a model may have none.
REQUIRED = (
    "<|begin_of_sentence|>",
    "<|end_of_sentence|>",
    "<think>",
    "</think>",
    "<|IMAGE_PLACEHOLDER|>",
    "<|IMAGE_START|>",
    "<|IMAGE_END|>",
    "<|VIDEO_START|>",
    "<|VIDEO_END|>",
)


class Tokenizer:
    """Encoder and decoder of one vocabulary. Safe to share between tasks of a process."""

    def __init__(self, table: TokenTable) -> None:
        self.warnings = table.warnings
        self._encode = table.encode
        self._bytes = table.token_bytes
        self._control = table.control
        self._literals = table.literals
        self._special_ids = frozenset(i for i, data in enumerate(self._bytes) if not data)
        self._control_ids = frozenset(self._control.values())
        self._control_start = re.compile(f"(?={_any_of(self._control)})")
        self._control_split = re.compile(f"({_any_of(self._control)})")
        self._literal_split = re.compile(f"({_any_of(self._literals)})") if self._literals else None
        # A token's text can also be spelt by single bytes; the longer piece, which comes later, is meant.
        self._ids_by_text = {data: i for i, data in enumerate(self._bytes) if data}

    @classmethod
    def load(cls, directory: Path) -> "Tokenizer":
        """Load the tokenizer of a model directory.

        Raises:
            CheckpointError: neither file exists, or a token the server needs (</think>, ...) is missing.
        """
        table = load_tokens(directory)
        missing = [text for text in REQUIRED if text not in table.control]
        if missing:
            raise CheckpointError(f"{directory}: the tokenizer has no token {', '.join(missing)}")
        return cls(table)

    @property
    def vocab_size(self) -> int:
        """The largest id plus one. The model's embedding may have more rows, without tokens."""
        return len(self._bytes)

    @property
    def control(self) -> dict[str, int]:
        """Control tokens by their text: specials and every added token of the form <...>."""
        return dict(self._control)

    @property
    def special_ids(self) -> frozenset[int]:
        """Ids that add nothing to an answer: those whose `token_bytes` is empty."""
        return self._special_ids

    def token_id(self, text: str) -> int | None:
        """Return the id of the token whose text is exactly `text`."""
        control = self._control.get(text)
        return self._ids_by_text.get(text.encode("utf-8", "replace")) if control is None else control

    def encode_text(self, text: str) -> list[int]:
        """Encode ordinary text, which never becomes a control token.

        The bytes of the ids are the text's UTF-8, but for U+2581, which SentencePiece reads as a space, and lone
        surrogates, which no UTF-8 can hold and which become U+FFFD.
        """
        text = _SURROGATE.sub("\ufffd", text)
        if self._literal_split is None:
            return self._encode_ordinary(text)
        ids: list[int] = []
        for i, part in enumerate(self._literal_split.split(text)):
            ids += [self._literals[part]] if i % 2 else self._encode_ordinary(part)
        return ids

    def encode_template(self, text: str) -> list[int]:
        """Encode trusted text (a template's own): recognise control tokens, encode the rest by `encode_text`."""
        ids: list[int] = []
        for i, part in enumerate(self._control_split.split(text)):
            ids += [self._control[part]] if i % 2 else self.encode_text(part)
        return ids

    def token_bytes(self, token_id: int) -> bytes:
        """Return the UTF-8 bytes that a token adds to an answer (perhaps part of a character); b"" for specials.

        Control tokens that are text to a reader or a parser (<think>, </think>, <tool_call>, </tool_call>) give
        their name. Ids from `vocab_size` on, which a model can generate and no token owns, give b"".
        """
        return self._bytes[token_id] if token_id < len(self._bytes) else b""

    def _encode_ordinary(self, text: str) -> list[int]:
        ids: list[int] = []
        start = 0
        for match in self._control_start.finditer(text):
            cut = match.start() + 1
            ids += self._encode_fragment(text[start:cut])
            start = cut
        return ids + self._encode_fragment(text[start:])

    def _encode_fragment(self, fragment: str) -> list[int]:
        """Encode text that does not spell a control token; if it normalises to one, a character at a time."""
        ids = self._encode(fragment)
        if self._control_ids.isdisjoint(ids):
            return ids
        return [i for character in fragment for i in self._encode(character)]


_SURROGATE = re.compile("[\ud800-\udfff]")


def _any_of(words: Iterable[str]) -> str:
    """Return a pattern for the longest of `words`, as a trie: an alternation would try each of thousands in turn."""
    trie: dict[str, Any] = {}
    for word in words:
        node = trie
        for character in word:
            node = node.setdefault(character, {})
        node[""] = {}
    return _trie_pattern(trie)


def _trie_pattern(node: dict[str, Any]) -> str:
    branches = [re.escape(character) + _trie_pattern(below) for character, below in node.items() if character]
    if not branches:
        return ""
    pattern = branches[0] if len(branches) == 1 else f"(?:{'|'.join(branches)})"
    return f"(?:{pattern})?" if "" in node else pattern
