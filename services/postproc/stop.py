"""Finds the first of several strings in text that arrives in pieces: stop strings, and markers spelled as text.

The match that ends first wins; of two that end at the same character, the longer. This does not depend on how the
text was cut, and it needs one pass: an Aho-Corasick automaton whose depth says how many of the last characters might
still become a match, and so must be held back.
"""

import re
from collections import deque
from collections.abc import Iterator, Sequence
from functools import lru_cache


class Patterns:
    """The automaton of some non-empty strings; immutable, shared by everybody who looks for the same ones.

    Node 0 is the start. `depth` is the length of the longest pattern prefix that ends here, `match` the longest whole
    pattern that ends here ("" if none).

    Raises:
        ValueError: no string, or an empty one, which would match everywhere.
    """

    __slots__ = ("depth", "edges", "fail", "first", "match")

    def __init__(self, strings: Sequence[str]) -> None:
        if not strings or not all(strings):
            raise ValueError("cannot look for an empty string")
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
        """The node after `char`."""
        while char not in self.edges[node]:
            if node == 0:
                return 0
            node = self.fail[node]
        return self.edges[node][char]


@lru_cache(maxsize=256)
def compile_patterns(strings: tuple[str, ...]) -> Patterns:
    """`Patterns`, built once for requests that ask for the same strings."""
    return Patterns(strings)


class Finder:
    """Looks for patterns in a growing text, giving out what can no longer be part of a match."""

    __slots__ = ("_held", "_node", "_patterns")

    def __init__(self, patterns: Patterns) -> None:
        self._patterns = patterns
        self._node = 0
        self._held = ""  # seen, not given out: the last `depth` characters

    def push(self, text: str, start: int = 0) -> tuple[str, str, int]:
        """Look through text[start:].

        Returns (text that comes before any match, the match or "", where in `text` the search ended). After a match
        the finder is as new, so that a caller may go on from there.
        """
        patterns, node, at = self._patterns, self._node, start
        while at < len(text):
            if node == 0:
                possible = patterns.first.search(text, at)
                if possible is None:
                    break
                at = possible.start()
            node = patterns.step(node, text[at])
            at += 1
            if match := patterns.match[node]:
                seen = self._held + text[start:at]
                self._node, self._held = 0, ""
                return seen[: -len(match)], match, at
        seen = self._held + text[start:]
        safe = len(seen) - patterns.depth[node]
        self._node, self._held = node, seen[safe:]
        return seen[:safe], "", len(text)

    def split(self, text: str) -> Iterator[tuple[str, str]]:
        """Look through all of `text`: each match, "" the last time, with the text before it."""
        at = 0
        while at < len(text):
            plain, match, at = self.push(text, at)
            yield plain, match

    def flush(self) -> str:
        """What is held back, when nothing can follow it directly."""
        held, self._node, self._held = self._held, 0, ""
        return held


class Stop:
    """The stop strings of one text of an answer. After a match the text is over and nothing more comes out.

    The match itself is shown only with `include`.
    """

    __slots__ = ("_finder", "_include", "matched")

    def __init__(self, strings: tuple[str, ...], include: bool) -> None:
        self._finder = Finder(compile_patterns(strings)) if strings else None
        self._include = include
        self.matched = False

    def push(self, text: str) -> str:
        """The part of the text so far that may be shown now."""
        if self._finder is None or self.matched:
            return "" if self.matched else text
        shown, match, _ = self._finder.push(text)
        self.matched = bool(match)
        return shown + match if self._include else shown

    def flush(self) -> str:
        """What was held back, when nothing can follow it directly."""
        return self._finder.flush() if self._finder else ""
