r"""Patterns without look-around match what those with it do, judged by Python's `re` on all short texts of some pieces.

`re` and JavaScript read these patterns alike, but for $, which in Python also stands before a last \n.
"""

import re
from itertools import product

import pytest

from shared.grammar.patterns import MAX_HEADS, MAX_LENGTH, MAX_PARENTHESES, searched_patterns, whole_patterns

# As z.toJSONSchema writes them (zod 4.0 to 4.3 the first, all until 4.6 the others).
EMAIL = r"^(?!\.)(?!.*\.\.)([A-Za-z0-9_'+\-\.]*)[A-Za-z0-9_+-]@([A-Za-z0-9][A-Za-z0-9\-]*\.)+[A-Za-z]{2,}$"
DURATION = r"^P(?:(\d+W)|(?!.*W)(?=\d|T\d)(\d+Y)?(\d+M)?(\d+D)?(T(?=\d)(\d+H)?(\d+M)?(\d+([.,]\d+)?S)?)?)$"
HOSTNAME = (
    r"^(?=.{1,253}\.?$)[a-zA-Z0-9](?:[a-zA-Z0-9-]{0,61}[a-zA-Z0-9])?"
    r"(?:\.[a-zA-Z0-9](?:[-0-9a-zA-Z]{0,61}[0-9a-zA-Z])?)*\.?$"
)
PASSWORD = r"^(?=.*[A-Z])(?=.*\d|.*_).{3,}$"
LABEL = "a" * 63


def texts(pieces: list[str], longest: int) -> list[str]:
    return ["".join(text) for length in range(longest + 1) for text in product(pieces, repeat=length)]


@pytest.mark.parametrize(
    ("pattern", "tried"),
    [
        (EMAIL, texts(["a", "'", ".", "@", "-", "bc"], 6)),
        (DURATION, ["P" + text for text in texts(["T", "1Y", "2M", "3D", "4H", "5S", "6.7S", "8W", "9"], 5)]),
        (DURATION, ["", "P1Y2M3DT4H5M6S", "P1Y2M3DT4H5M6,7S", "P1Y2M3DT", "1Y", "P-1D"]),
        (HOSTNAME, texts(["a", "-", ".", LABEL, "a" * 64], 6)),
        (PASSWORD, texts(["A", "b", "1", "_"], 5)),
        (r"^(?=a|b)(?=\w\))\w[)|]$", texts(["a", "b", ")", "|"], 3)),
        (r"^(?=a)a|b$", texts(["a", "b"], 3)),
        (r"^(?=a)?b", texts(["a", "b"], 3)),
        (r"(?=.b)[a-c]+$", texts(["a", "b", "c"], 4)),
    ],
)
def test_a_search_finds_the_same(pattern: str, tried: list[str]) -> None:
    others = [re.compile(one) for one in searched_patterns(pattern)]
    wanted = [bool(re.search(pattern, text)) for text in tried]
    assert [all(one.search(text) for one in others) for text in tried] == wanted
    assert True in wanted
    assert False in wanted


@pytest.mark.parametrize("pattern", [EMAIL, DURATION, HOSTNAME, PASSWORD])
def test_no_look_around_is_left(pattern: str) -> None:
    assert not any("(?=" in one or "(?!" in one for one in [*searched_patterns(pattern), *whole_patterns(pattern)])


@pytest.mark.parametrize(
    ("pattern", "tried"),
    [
        (r"^https:\/\/a[ab]+\.com\/?$\n", texts(["https://", "ab", ".com", "/", "\n"], 5)),
        ("^a+$\n", texts(["a", "\n", "$"], 3)),
        (r"a\$\n", texts(["a", "\n", "$"], 3)),
        (r"a\\$\n", texts(["a", "\n", "\\", "$"], 3)),
        (r"(?=.b)[a-c]+", texts(["a", "b", "c"], 4)),
        (r"^(?=.b\$)[a-c$]+", texts(["a", "b", "c", "$"], 4)),
        (r"(?=.b$)[a-c]+$", texts(["a", "b", "c"], 4)),
        (r"(^(?=.b)[a-c]+$)", texts(["a", "b", "c"], 4)),
        (r"(?:(^a$\n))", texts(["a", "\n"], 3)),
        (r"(^(?=a)a)(b)", texts(["a", "b"], 3)),
        (PASSWORD, texts(["A", "b", "1", "_"], 5)),
    ],
)
def test_a_whole_text_matches_the_same(pattern: str, tried: list[str]) -> None:
    others = [re.compile(one) for one in whole_patterns(pattern)]
    wanted = [bool(re.fullmatch(pattern, text)) for text in tried]
    assert [all(one.fullmatch(text) for one in others) for text in tried] == wanted
    assert True in wanted


@pytest.mark.parametrize(
    "pattern",
    [
        "",
        "a",
        "^a$",
        "(a)",
        "(?:a|b)",
        "(?i:a)",
        r"\$\n",
        "^(?=a",
        "^(?!a)b",
        "a(?=b)",
        "^" + (MAX_HEADS + 1) * "(?=a)" + "a",
    ],
)
def test_any_other_is_left_as_it_is(pattern: str) -> None:
    assert searched_patterns(pattern) == whole_patterns(pattern) == [pattern]


def test_a_pattern_longer_than_anybody_writes_is_left_as_it_is() -> None:
    for length, found in ((MAX_LENGTH, 2), (MAX_LENGTH + 1, 1)):
        pattern = "^(?=a)".ljust(length, "a")
        assert len(searched_patterns(pattern)) == len(whole_patterns(pattern)) == found


def test_no_more_parentheses_are_taken_off_than_anybody_writes() -> None:
    wrapped = "(" * (MAX_PARENTHESES + 1) + "(?=a)a" + ")" * (MAX_PARENTHESES + 1)
    assert whole_patterns(wrapped) == ["((?=a)a)"]
    assert whole_patterns(wrapped[1:-1]) == ["^a", r"a[\s\S]*"]
