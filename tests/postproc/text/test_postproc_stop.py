"""Stop strings against a brute-force reference, over every way of cutting the text."""

from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from services.postproc.text.stop import Automaton, PatternFinder, StopStrings, compile_automaton

texts = st.text(alphabet="ab]^€", max_size=40)
strings = st.lists(st.text(alphabet="ab]^€", min_size=1, max_size=5), min_size=1, max_size=4).map(tuple)


def first_match(text: str, wanted: tuple[str, ...]) -> tuple[int, str] | None:
    """(end, match) of the match that ends first, the longest of those."""
    for end in range(1, len(text) + 1):
        if found := [string for string in wanted if text[:end].endswith(string)]:
            return end, max(found, key=len)
    return None


def pieces(text: str, cuts: list[int]) -> list[str]:
    places = sorted({0, len(text), *(place % (len(text) + 1) for place in cuts)})
    return [text[a:b] for a, b in pairwise(places)]


@given(texts, strings, st.lists(st.integers(0, 40)), st.booleans())
@example("aab", ("aab", "ab"), [0, 1, 2], False)
@example("aabb", ("aabb", "ab"), [], False)
@example("abab^", ("abac", "bab^"), list(range(5)), False)
def test_stops_where_brute_force_does(text: str, wanted: tuple[str, ...], cuts: list[int], include: bool) -> None:
    stop = StopStrings(wanted, include)
    shown = ""
    for piece in pieces(text, cuts):
        shown += stop.filter(piece)
    expected = first_match(text, wanted)
    if expected is None:
        assert not stop.matched
        assert shown + stop.flush() == text
    else:
        end, match = expected
        assert stop.matched
        assert shown == text[: end if include else end - len(match)]
        assert stop.filter("more") == stop.flush() == ""


@given(texts, strings)
def test_holds_back_no_more_than_may_become_a_match(text: str, wanted: tuple[str, ...]) -> None:
    finder = PatternFinder(Automaton(wanted))
    shown = ""
    for end, char in enumerate(text, start=1):
        plain, match, _ = finder.search(char)
        shown += plain
        if match:
            return
        seen = text[:end]
        held = max((n for n in range(end + 1) for s in wanted if n < len(s) and seen.endswith(s[:n])), default=0)
        assert shown == seen[: end - held]


@given(texts, strings, st.lists(st.integers(0, 40)))
def test_goes_on_behind_a_match(text: str, wanted: tuple[str, ...], cuts: list[int]) -> None:
    def split(parts: list[str]) -> list[str]:
        finder, out = PatternFinder(compile_automaton(wanted)), [""]
        for part in parts:
            at = 0
            while at < len(part):
                plain, match, at = finder.search(part, at)
                out[-1] += plain
                out += [match, ""] if match else []
        out[-1] += finder.flush()
        return out

    expected, rest = [""], text
    while found := first_match(rest, wanted):
        end, match = found
        expected[-1] += rest[: end - len(match)]
        expected += [match, ""]
        rest = rest[end:]
    expected[-1] += rest
    assert split(pieces(text, cuts)) == expected


def test_without_strings_everything_is_shown_at_once() -> None:
    stop = StopStrings((), include=True)
    assert stop.filter("anything") == "anything"
    assert stop.flush() == ""
    assert not stop.matched


def test_flush_forgets_the_beginning_of_a_match() -> None:
    stop = StopStrings(("ab",), include=False)
    assert stop.filter("xa") == "x"
    assert stop.flush() == "a"
    assert stop.filter("b") == "b"
    assert not stop.matched


@pytest.mark.parametrize("wanted", [(), ("",), ("a", "")])
def test_an_empty_string_is_refused(wanted: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="empty"):
        Automaton(wanted)


def test_a_long_run_of_near_misses() -> None:
    stop = StopStrings(("a" * 500 + "b",), include=False)
    shown = "".join(stop.filter("a") for _ in range(20_000))
    assert len(shown) == 20_000 - 500
    assert stop.filter("b") == ""
    assert stop.matched
