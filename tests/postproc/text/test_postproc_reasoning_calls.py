"""Calls at the end of reasoning that no </think> ends."""

import json
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from postproc_stand_in import Shown, cuts, every_byte, run

from services.postproc.text.answer import Parsers

MARKERS = ("<tool_call>", "</tool_call>")
F = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'
G = '<tool_call>{"name": "g", "arguments": {}}</tool_call>'
OTHER = '<tool_call>{"name": "other", "arguments": {}}</tool_call>'

# text -> reasoning, calls
CALLS = {
    "last": (f"Hm.\n\n{F}", "Hm.", [("f", '{"a": 1}')]),
    "nothing but whitespace after it": (f"Hm.\n{F}\n \n", "Hm.", [("f", '{"a": 1}')]),
    "nothing before it": (F, "", [("f", '{"a": 1}')]),
    "two": (f"Hm.\n{F}\n{G}\n", "Hm.", [("f", '{"a": 1}'), ("g", "{}")]),
    "one that was only thought of": (f"Use {F}? Yes.\n{G}", f"Use {F}? Yes.", [("g", "{}")]),
    "after one that is not declared": (f"{OTHER}\n{F}", OTHER, [("f", '{"a": 1}')]),
    "after one that is malformed": (f"<tool_call>f\n{G}", "<tool_call>f", [("g", "{}")]),
    "after one that ends too early": (
        f'<tool_call>{{"name": "f", "arguments": {{"a": 2{G}',
        '<tool_call>{"name": "f", "arguments": {"a": 2',
        [("g", "{}")],
    ),
    "without closing markers": (
        f"Hm.\n{F.removesuffix('</tool_call>')}{G.removesuffix('</tool_call>')}",
        "Hm.",
        [("f", '{"a": 1}'), ("g", "{}")],
    ),
    "a list": (
        '<tool_call>[{"name": "f", "arguments": {"a": [1,]}}, {"name": "g"}]</tool_call>',
        "",
        [("f", '{"a": [1]}'), ("g", "{}")],
    ),
}  # fmt: skip

THOUGHTS = {
    "text after it": f"Hm.\n{F} or not",
    "not declared": f"Hm.\n{OTHER}",
    "the second is not declared": f"{F}\n{OTHER}",
    "not declared in a list": '<tool_call>[{"name": "f"}, {"name": "other"}]</tool_call>',
    "a closing marker too many": f"{F}</tool_call>",
    "a closing marker alone": "Hm.</tool_call>\n",
    "malformed": "Hm.\n<tool_call>f(1)</tool_call>",
    "no closing brace": '<tool_call>{"name": "f", "arguments": {"a": 1}</tool_call>',
    "arguments without a closing brace": '<tool_call>{"name": "f", "arguments": {"a": 1</tool_call>',
    "no opening brace": '<tool_call>"name": "f", "arguments": {"a": 1}</tool_call>\n',
    "arguments that break": '<tool_call>{"name": "f", "arguments": {"a": 1, b: 2}}</tool_call>',
    "text after the object": '<tool_call>{"name": "f"} or so</tool_call>',
    "empty": "Hm.\n<tool_call>",
    "cut off in the name": '<tool_call>{"name": "f',
    "twice open": "<tool_call><tool_call>",
}


def think(text: str, places: list[int] | None = None, **options: Any) -> Shown:
    return run(text, places or [], **{"tools": True, "functions": ("f", "g"), **options})


@pytest.mark.parametrize("spelled", [(), MARKERS, MARKERS[:1]], ids=["tokens", "text", "half"])
@pytest.mark.parametrize(("text", "reasoning", "functions"), CALLS.values(), ids=CALLS)
def test_calls(text: str, reasoning: str, functions: list[tuple[str, str]], spelled: tuple[str, ...]) -> None:
    for places in ([], every_byte(text)):
        shown = think(text, places, spelled=spelled)
        assert shown.functions == functions
        assert (shown.reasoning, shown.content, shown.finish_reason) == (reasoning, "", "tool_calls")


@pytest.mark.parametrize("spelled", [(), MARKERS, MARKERS[:1]], ids=["tokens", "text", "half"])
@pytest.mark.parametrize("text", THOUGHTS.values(), ids=THOUGHTS)
def test_thoughts(text: str, spelled: tuple[str, ...]) -> None:
    for places in ([], every_byte(text)):
        shown = think(text, places, spelled=spelled)
        assert (shown.reasoning, shown.content, shown.calls, shown.finish_reason) == (text, "", [], "stop")


@pytest.mark.parametrize("text", [text for text, _, _ in CALLS.values()], ids=CALLS)
def test_thinking_that_ends_keeps_its_calls(text: str) -> None:
    for places in ([], every_byte(text)):
        shown = think(text + "\n</think>\n\nNo.", places)
        assert (shown.reasoning, shown.content, shown.calls) == (text.rstrip("\n"), "No.", [])
        shown = think(text + "</think>" + G, places)
        assert (shown.reasoning, shown.functions) == (text.rstrip("\n"), [("g", "{}")])


@pytest.mark.parametrize(
    "options",
    [
        {"finish": "length"},
        {"parsers": Parsers(tool_calls_in_reasoning=False)},
        {"parsers": Parsers(tool_calls=False)},
        {"tools": False},
        {"functions": ()},
    ],
    ids=["cut off", "turned off", "no parser", "no tools", "none declared"],
)
def test_without_a_reason_to_look_for_calls_they_are_thoughts(options: dict[str, Any]) -> None:
    text = f"Hm.\n{F}\n"
    for places in ([], every_byte(text)):
        shown = think(text, places, **options)
        assert (shown.reasoning, shown.content, shown.calls) == (text, "", [])
        assert shown.finish_reason == options.get("finish", "stop")


def test_one_call_only() -> None:
    shown = think(f"Hm.\n{F}\n{G}", parallel_tool_calls=False)
    assert (shown.reasoning, shown.functions) == ("Hm.", [("f", '{"a": 1}')])


@pytest.mark.parametrize(("text", "tokens"), [(f"abc{F}", 3), (F, 0), (f"abc\n\n{F}\n{G}", 5)])
def test_reasoning_tokens_are_counted_up_to_the_first_call(text: str, tokens: int) -> None:
    usage = think(text, every_byte(text)).usage
    assert usage is not None
    assert usage.reasoning_tokens == tokens
    released = think(text + ".", every_byte(text + ".")).usage
    assert released is not None
    assert released.reasoning_tokens == released.completion_tokens


def test_stop_strings_are_looked_for_in_thoughts_and_not_in_calls() -> None:
    shown = think(f"Hm.\n{F}", stop=('"name"',), stop_in_reasoning=True)
    assert (shown.reasoning, shown.finish_reason, len(shown.calls)) == ("Hm.", "tool_calls", 1)
    for places in ([], every_byte(F)):
        shown = think(f"Hm.\n{F}</think>\n\nA", places, stop=('"name"',), stop_in_reasoning=True)
        assert (shown.reasoning, shown.content, shown.finish_reason) == ("Hm.\n<tool_call>\n{", "", "stop")
        shown = think(f"Hm.\n{F}x", places, stop=('"name"',), stop_in_reasoning=True)
        assert (shown.reasoning, shown.calls, shown.finish_reason) == ("Hm.\n<tool_call>\n{", [], "stop")


def test_text_is_held_back_only_while_it_may_be_calls() -> None:
    text = "a<tool_call>f?b"
    assert think(text[: text.index("?")], every_byte(text), finish="cancelled").reasoning == "a<tool_call>f"
    text = 'a<tool_call>{"name": "other", "arguments": {"x": "'
    assert think(text, every_byte(text), finish="cancelled").reasoning == text
    text = f"a{F}"
    assert think(text, every_byte(text), finish="cancelled").reasoning == "a"


names = st.sampled_from(["f", "g", "other"])
calls = st.builds(lambda name, n: f'<tool_call>{json.dumps({"name": name, "arguments": {"n": n}})}</tool_call>', names,
                  st.integers())  # fmt: skip
thoughts = st.sampled_from(["x", "\n", " ", "</tool_call>", "<tool_call>", '{"name": "f"}', "é"])


@given(
    parts=st.lists(calls | thoughts, max_size=8),
    places=cuts,
    takes=st.lists(st.integers(0, 100)),
    spelled=st.sampled_from([(), MARKERS]),
    end=st.sampled_from(["", "</think>", "</think>x"]),
    finish=st.sampled_from(["stop", "length"]),
)
def test_nothing_is_lost_and_any_cut_shows_the_same(
    parts: list[str], places: list[int], takes: list[int], spelled: tuple[str, ...], end: str, finish: str
) -> None:
    text = "".join(parts)
    whole = think(text + end, spelled=spelled, finish=finish)
    pieces = think(text + end, places, spelled=spelled, finish=finish, takes=takes)
    fine = think(text + end, every_byte(text + end), spelled=spelled, finish=finish)
    for shown in (pieces, fine):
        assert (shown.reasoning, shown.content, shown.calls) == (whole.reasoning, whole.content, whole.calls)
    begins = [] if end or finish == "length" else [i for i in places_of("<tool_call>", text) if only_calls(text[i:])]
    if begins:
        assert whole.reasoning == text[: begins[0]].rstrip("\n")
        assert len(whole.calls) == text[begins[0] :].count('"name"')
    else:
        assert (whole.reasoning, whole.calls) == (text.rstrip("\n") if end else text, [])


def places_of(part: str, text: str) -> list[int]:
    return [match.start() for match in re.finditer(re.escape(part), text)]


def only_calls(text: str) -> bool:
    """Every <tool_call> in it is followed by objects of declared functions, then perhaps by </tool_call>."""
    _, *bodies = text.split("<tool_call>")
    return all(all_declared(body) for body in bodies)


def all_declared(body: str) -> bool:
    inside, _, after = body.partition("</tool_call>")
    rest, names = inside.strip(), []
    while rest:
        try:
            value, end = json.JSONDecoder().raw_decode(rest)
        except ValueError:
            return False
        names.append(value["name"])
        rest = rest[end:].strip()
    return bool(names) and {"f", "g"}.issuperset(names) and not after.strip()
