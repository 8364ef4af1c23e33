"""Search for the first of several strings in text that arrives in pieces: stop strings, and markers spelled as text.

The match that ends first wins; of two that end at the same character, the longer. This does not depend on how the
text was cut, and the search needs one pass: the depth in an Aho-Corasick automaton is the number of last characters
that might still become a match, and so must be held back.
"""

import re
from collections import deque
from collections.abc import Iterator, Sequence
from functools import lru_cache


class Automaton:
    """Aho-Corasick automaton of some non-empty strings; immutable, shared by all requests with the same strings.

    Node 0 is the start. `depth` is the length of the longest pattern prefix that ends here, `match` the longest whole
    pattern that ends here ("" if none).

    Raises:
        ValueError: no string, or an empty one, which would match everywhere.
    """

    __slots__ = ("depth", "edges", "fail", "first", "match")

    def __init__(self, strings: Sequence[str]) -> None:
        if not strings or not all(strings):
            raise ValueError("an empty string cannot be searched for: it would match everywhere")
        self.edges: list[dict[str, int]] = [{}]
        self.depth = [0]
        self.match = [""]
        self.fail = [0]
        for string in strings:
            self._add(string)
        self._link()
        # Lets a search leap to where a match may begin.
        self.first = re.compile("[" + "".join(map(re.escape, self.edges[0])) + "]")

    def _add(self, string: str) -> None:
        node = 0
        for char in string:
            child = self.edges[node].get(char)
            if child is None:
                child = len(self.edges)
                self.edges[node][char] = child
                self.edges.append({})
                self.depth.append(self.depth[node] + 1)
                self.match.append("")
                self.fail.append(0)
            node = child
        self.match[node] = string

    def _link(self) -> None:
        """Breadth first, so that a node's fail link, being shallower, is finished before the node."""
        queue = deque(self.edges[0].values())
        while queue:
            node = queue.popleft()
            self.match[node] = self.match[node] or self.match[self.fail[node]]
            for char, child in self.edges[node].items():
                self.fail[child] = self.step(self.fail[node], char)
                queue.append(child)

    def step(self, node: int, char: str) -> int:
        """Return the node after `char`."""
        while char not in self.edges[node]:
            if node == 0:
                return 0
            node = self.fail[node]
        return self.edges[node][char]


@lru_cache(maxsize=256)
def compile_automaton(strings: tuple[str, ...]) -> Automaton:
    """Build an `Automaton`, once for all requests with the same strings."""
    return Automaton(strings)


class PatternFinder:
    """Search in a growing text, which returns text as soon as it can no longer be part of a match."""

    __slots__ = ("_automaton", "_held", "_node")

    def __init__(self, automaton: Automaton) -> None:
        self._automaton = automaton
        self._node = 0
        self._held = ""  # seen, not returned: the last `depth` characters

    def search(self, text: str, start: int = 0) -> tuple[str, str, int]:
        """Search text[start:] up to the first match.

        Returns (text before any match, the match or "", the index in `text` at which the search ended). After a match
        the finder is in its first state, so that a caller may go on from that index.
        """
        automaton, node, at = self._automaton, self._node, start
        while at < len(text):
            if node == 0:
                possible = automaton.first.search(text, at)
                if possible is None:
                    break
                at = possible.start()
            node = automaton.step(node, text[at])
            at += 1
            if match := automaton.match[node]:
                seen = self._held + text[start:at]
                self._node, self._held = 0, ""
                return seen[: -len(match)], match, at
        seen = self._held + text[start:]
        safe = len(seen) - automaton.depth[node]
        self._node, self._held = node, seen[safe:]
        return seen[:safe], "", len(text)

    def split(self, text: str) -> Iterator[tuple[str, str]]:
        """Search all of `text` and yield (text before a match, match); the last match may be ""."""
        at = 0
        while at < len(text):
            plain, match, at = self.search(text, at)
            yield plain, match

    def flush(self) -> str:
        """Return the text that was held back, when no text can follow it directly."""
        held, self._node, self._held = self._held, 0, ""
        return held


class StopStrings:
    """The stop strings of one text of an answer. A match ends the text, and is shown only with `include`."""

    __slots__ = ("_finder", "_include", "matched")

    def __init__(self, strings: tuple[str, ...], include: bool) -> None:
        self._finder = PatternFinder(compile_automaton(strings)) if strings else None
        self._include = include
        self.matched = ""  # the string that ended the text

    def filter(self, text: str) -> str:
        """Return the part of the text so far that may be shown now; none after a match."""
        if self._finder is None or self.matched:
            return "" if self.matched else text
        shown, match, _ = self._finder.search(text)
        self.matched = match
        return shown + match if self._include else shown

    def flush(self) -> str:
        """Return the text that was held back, when no text can follow it directly."""
        return self._finder.flush() if self._finder else ""
