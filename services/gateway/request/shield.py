"""Keeps the client's text apart from the template's while both are in one string.

A control token in the rendered prompt must have been written by the template. So before rendering, a random mark is put
into every string of the client's after each character with which a control token can begin; whatever control token
still stands in the rendered prompt is the template's, and the marks are taken out again afterwards.
"""

import re
import secrets
import string
from collections.abc import Iterable, Iterator
from typing import Any

from shared.errors import CheckpointError

MARK_LENGTH = 16


class ControlTexts:
    """The texts that mean a token, or a place for media, where the template writes them."""

    def __init__(self, texts: Iterable[str]) -> None:
        """
        Raises:
            CheckpointError: a text has one character, or leaves no letter to mark with; no mark could keep it apart.
        """
        self._texts = frozenset(texts)
        for text in self._texts:
            if len(text) < 2:
                raise CheckpointError(f"the control token {text!r} is too short to be told from text")
        self._lengths = sorted({len(text) for text in self._texts}, reverse=True)
        firsts = {text[0] for text in self._texts}
        seconds = {text[1] for text in self._texts}
        self._first = re.compile(f"[{_class(firsts)}]")
        self._start = re.compile(f"[{_class(firsts)}][{_class(seconds)}]")
        alphabet = [c for c in string.ascii_letters + string.digits if c not in firsts]
        # No control token has this as its second character, so none can begin before a mark.
        leads = [c for c in alphabet if c not in seconds]
        if not leads:
            raise CheckpointError(
                "the control tokens begin with every letter and digit; none is left to mark text with"
            )
        self._alphabet, self._lead = alphabet, leads[0]

    def mark(self) -> str:
        """A fresh mark."""
        return self._lead + "".join(secrets.choice(self._alphabet) for _ in range(MARK_LENGTH))

    def hide(self, value: Any, mark: str) -> Any:
        """`value` (JSON) with every string in it marked, keys included."""
        if isinstance(value, str):
            return self._first.sub(lambda found: found.group() + mark, value)
        if isinstance(value, dict):
            return {self.hide(key, mark): self.hide(item, mark) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.hide(item, mark) for item in value]
        return value

    def split(self, rendered: str, mark: str) -> Iterator[tuple[str, bool]]:
        """(text, False) without marks and (control text, True), in order; the longest control text wins."""
        done = 0
        while (found := self._next(rendered, done)) is not None:
            start, text = found
            if start > done:
                yield rendered[done:start].replace(mark, ""), False
            yield text, True
            done = start + len(text)
        if done < len(rendered):
            yield rendered[done:].replace(mark, ""), False

    def _next(self, rendered: str, position: int) -> tuple[int, str] | None:
        while (found := self._start.search(rendered, position)) is not None:
            start = found.start()
            for length in self._lengths:
                if (text := rendered[start : start + length]) in self._texts:
                    return start, text
            position = start + 1
        return None


def _class(characters: set[str]) -> str:
    return "".join(re.escape(c) for c in sorted(characters))
