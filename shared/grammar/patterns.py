r"""Patterns that people's libraries write with look-around, which the grammar library refuses, as the same without.

(?=A) at the beginning      both patterns have to match: of what A says, and of what follows
$\n at the end              \n, since $ also stands before a last line's end
zod's                       patterns that it writes for its string types, each with one that matches the same texts
"""

import re
from collections.abc import Iterator

# What is read of a pattern: enough for those in use, and no more passes over a hostile one.
MAX_LENGTH = 4096
MAX_HEADS = 8
MAX_PARENTHESES = 4

_LAST_LINE = re.compile(r"(?<!\\)((?:\\\\)*)\$(?:\\n|\n)\Z")
_TO_BE_READ = re.compile(r"\(\?[=!]|\$(?:\\n|\n)\)*\Z")
_ENDS = re.compile(r"(?<!\\)(?:\\\\)*\$\Z")
# Of a date or a time each part may be missing, but not all.
_DATE = r"(?:\d+Y(?:\d+M)?(?:\d+D)?|\d+M(?:\d+D)?|\d+D)"
_SECONDS = r"\d+(?:[.,]\d+)?S"
_TIME = rf"T(?:\d+H(?:\d+M)?(?:{_SECONDS})?|\d+M(?:{_SECONDS})?|{_SECONDS})"
_WITHOUT_LOOK_AROUND = {
    # zod 4.0 to 4.3: no dot at the beginning, and no two side by side. zod 4.6 writes it so itself.
    r"^(?!\.)(?!.*\.\.)([A-Za-z0-9_'+\-\.]*)[A-Za-z0-9_+-]@([A-Za-z0-9][A-Za-z0-9\-]*\.)+[A-Za-z]{2,}$": (
        r"^(?:[A-Za-z0-9_'+\-]+\.)*[A-Za-z0-9_'+\-]*[A-Za-z0-9_+-]@(?:[A-Za-z0-9][A-Za-z0-9\-]*\.)+[A-Za-z]{2,}$"
    ),
    r"^P(?:(\d+W)|(?!.*W)(?=\d|T\d)(\d+Y)?(\d+M)?(\d+D)?(T(?=\d)(\d+H)?(\d+M)?(\d+([.,]\d+)?S)?)?)$": (
        rf"^P(?:\d+W|{_DATE}(?:{_TIME})?|{_TIME})$"
    ),
}


def searched_patterns(pattern: str) -> list[str]:
    """Return patterns of JSON Schema that a text has to match, all of them, to match `pattern`."""
    if len(pattern) > MAX_LENGTH:
        return [pattern]
    heads, rest = _split(_WITHOUT_LOOK_AROUND.get(pattern, pattern))
    return [rest, *(f"^{head}" for head in heads)]


def whole_patterns(pattern: str) -> list[str]:
    """Return regular expressions that a text has to match as a whole, all of them, to match `pattern` so."""
    if len(pattern) > MAX_LENGTH or not _TO_BE_READ.search(pattern):
        return [pattern]
    inner = _unwrapped(pattern)
    plain = _LAST_LINE.sub(r"\1\\n", _WITHOUT_LOOK_AROUND.get(inner, inner))
    heads, rest = _split(f"^{plain}" if plain.startswith("(?=") else plain)
    return [rest, *(head if _ENDS.search(head) else rf"{head}[\s\S]*" for head in heads)]


def _split(pattern: str) -> tuple[list[str], str]:
    """Return what stands in look-aheads at the beginning of a pattern, and the pattern without them.

    A pattern of alternatives is left as it is, since its look-aheads belong to the first of them.
    """
    heads: list[str] = []
    rest = pattern[1:] if pattern.startswith("^") else ""
    while rest.startswith("(?="):
        length = _group_length(rest)
        if length is None or len(heads) == MAX_HEADS:
            return [], pattern
        heads.append(_grouped(rest[3 : length - 1]))
        rest = rest[length:]
    if not heads or _has_alternatives(rest) or rest[:1] in ("*", "+", "?", "{"):
        return [], pattern
    return heads, f"^{rest}"


def _unwrapped(pattern: str) -> str:
    """Return a pattern without the parentheses around all of it, which Outlines adds."""
    for _ in range(MAX_PARENTHESES):
        if not pattern.startswith("(") or _group_length(pattern) != len(pattern):
            break
        inner = pattern[1:-1].removeprefix("?:")
        if inner.startswith("?"):
            break
        pattern = inner
    return pattern


def _grouped(pattern: str) -> str:
    return f"(?:{pattern})" if _has_alternatives(pattern) else pattern


def _group_length(pattern: str) -> int | None:
    """Return the length of the group that a pattern begins with; None if it does not end."""
    return next((place + 1 for place, depth, sign in _signs(pattern) if sign == ")" and depth == 0), None)


def _has_alternatives(pattern: str) -> bool:
    return any(sign == "|" and depth == 0 for _, depth, sign in _signs(pattern))


def _signs(pattern: str) -> Iterator[tuple[int, int, str]]:
    """Yield parentheses and bars with their places, and the depth behind them; those of text or a class left out."""
    depth, in_class, escaped = 0, False, False
    for place, sign in enumerate(pattern):
        if escaped:
            escaped = False
        elif sign == "\\":
            escaped = True
        elif in_class:
            in_class = sign != "]"
        elif sign == "[":
            in_class = True
        elif sign in "()|":
            depth += {"(": 1, ")": -1}.get(sign, 0)
            yield place, depth, sign
