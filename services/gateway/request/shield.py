"""Separation of the client's text from the template's while both are in one rendered string.

Only the template may write control tokens. So before rendering, a random mark is inserted into every string of the
client's, after each character with which a control token can begin. A control token that is then found in the rendered
prompt was written by the template. The marks are removed afterwards.
"""

import re
import secrets
import string
from collections.abc import Iterable, Iterator
from typing import Any

from shared.errors import CheckpointError

MARK_LENGTH = 16


class ControlTexts:
    """Set of the texts that stand for a control token, or a placeholder of media, where the template writes them."""

    def __init__(self, texts: Iterable[str]) -> None:
        """Prepare the search for `texts`.

        Raises:
            CheckpointError: no mark could tell them from text: one has a single character, or together they begin with
                every letter and digit.
        """
        self._texts = frozenset(texts)
        for text in self._texts:
            if len(text) < 2:
                raise CheckpointError(
                    f"the control token {text!r} is too short to be told from text: it needs 2 characters"
                )
        self._lengths = sorted({len(text) for text in self._texts}, reverse=True)
        firsts = {text[0] for text in self._texts}
        seconds = {text[1] for text in self._texts}
        self._first = re.compile(f"[{_character_class(firsts)}]")
        self._start = re.compile(f"[{_character_class(firsts)}][{_character_class(seconds)}]")
        alphabet = [c for c in string.ascii_letters + string.digits if c not in firsts]
        # No control token has this as its second character, so none can begin before a mark.
        leads = [c for c in alphabet if c not in seconds]
        if not leads:
            raise CheckpointError(
                "the control tokens begin with every letter and digit, so none is left to mark text with"
            )
        self._alphabet, self._lead = alphabet, leads[0]

    def mark(self) -> str:
        """Draw a random mark."""
        return self._lead + "".join(secrets.choice(self._alphabet) for _ in range(MARK_LENGTH))

    def hide(self, value: Any, mark: str) -> Any:
        """Return `value` (JSON) with every string in it marked, keys included. A kind of string remains that kind."""
        if isinstance(value, str):
            return type(value)(self._first.sub(lambda found: found.group() + mark, value))
        if isinstance(value, dict):
            return {self.hide(key, mark): self.hide(item, mark) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.hide(item, mark) for item in value]
        return value

    def split(self, rendered: str, mark: str) -> Iterator[tuple[str, bool]]:
        """Yield (text without marks, False) and (control text, True), in order; the longest control text wins."""
        done = 0
        while (found := self._find_control(rendered, done)) is not None:
            start, text = found
            if start > done:
                yield rendered[done:start].replace(mark, ""), False
            yield text, True
            done = start + len(text)
        if done < len(rendered):
            yield rendered[done:].replace(mark, ""), False

    def _find_control(self, rendered: str, position: int) -> tuple[int, str] | None:
        while (found := self._start.search(rendered, position)) is not None:
            start = found.start()
            for length in self._lengths:
                if (text := rendered[start : start + length]) in self._texts:
                    return start, text
            position = start + 1
        return None


def _character_class(characters: set[str]) -> str:
    return "".join(re.escape(c) for c in sorted(characters))
