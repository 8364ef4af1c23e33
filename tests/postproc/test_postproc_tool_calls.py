"""Tool calls as models write them, well and badly, over every way of cutting them into tokens."""

import json
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from postproc_stand_in import StandIn, cuts, every_byte, json_values, request, run, run_pieces

from services.postproc.answer import Answer, Parsers
from services.postproc.detokenize import Vocabulary
from services.postproc.tool_calls import call_id

SPELLED = ("<tool_call>", "</tool_call>")
OPEN, CLOSE = SPELLED

# text after thinking -> content, [(name, arguments)]
WELL = {
    "as the model writes it": (
        '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>\n',
        "",
        [("get_weather", '{"city": "Paris"}')],
    ),
    "two calls": (
        '<tool_call>\n{"name": "f", "arguments": {"a": {"b": 1}}}\n</tool_call>\n'
        '<tool_call>\n{"name": "g", "arguments": {"c": [{}]}}\n</tool_call>\n',
        "",
        [("f", '{"a": {"b": 1}}'), ("g", '{"c": [{}]}')],
    ),
    "name and arguments at once": (
        '<tool_call>{"name":"f","arguments":{}}</tool_call>',
        "",
        [("f", "{}")],
    ),
    "nested closing braces": (
        '<tool_call>{"name": "f", "arguments": {"a": {"b": {"c": {}}}, "d": [[{"e": {}}]]}}</tool_call>',
        "",
        [("f", '{"a": {"b": {"c": {}}}, "d": [[{"e": {}}]]}')],
    ),
    "braces and quotes in strings": (
        r'<tool_call>{"name": "f", "arguments": {"a": "}}{\"]", "b\\": "\\", "}": "{"}}</tool_call>',
        "",
        [("f", r'{"a": "}}{\"]", "b\\": "\\", "}": "{"}')],
    ),
    "arguments before the name": (
        '<tool_call>{"arguments": {"a": 1}, "name": "f"}</tool_call>',
        "",
        [("f", '{"a": 1}')],
    ),
    "other keys": (
        '<tool_call>{"id": 1, "type": "x}\\"", "o": {"name": "no", "arguments": {}}, "name": "f", "l": [1, "]"], '
        '"arguments": {"a": 1}, "n": null}</tool_call>',
        "",
        [("f", '{"a": 1}')],
    ),
    "the first of repeated keys": (
        '<tool_call>{"name": "f", "arguments": {"a": 1}, "name": "g", "arguments": {"b": 2}}</tool_call>',
        "",
        [("f", '{"a": 1}')],
    ),
    "white space everywhere": (
        '<tool_call>\r\n\t { "name" \n: "f" ,\n "arguments" : \n{ "a" :\n1 } } \n</tool_call>',
        "",
        [("f", '{ "a" :\n1 }')],
    ),
    "white space in arguments is kept": (
        '<tool_call>{"name": "f", "arguments": {\n  "a":  1\n}}</tool_call>',
        "",
        [("f", '{\n  "a":  1\n}')],
    ),
    "escapes in the name": (
        '<tool_call>{"n\\u0061me": "f\\u00e9\\n\\ud83d\\ude00", "arguments": {}}</tool_call>',
        "",
        [("fé\n😀", "{}")],
    ),
    "half a surrogate pair in the name": (
        '<tool_call>{"name": "f\\ud83d", "arguments": {}}</tool_call>',
        "",
        [("f\ufffd", "{}")],
    ),
    "arguments as a string": (
        r'<tool_call>{"name": "f", "arguments": "{\"a\": \"\u00e9\\n\ud83d\ude00\/\"}"}</tool_call>',
        "",
        [("f", '{"a": "é\\n😀/"}')],
    ),
    "arguments as an empty string": ('<tool_call>{"name": "f", "arguments": ""}</tool_call>', "", [("f", "{}")]),
    "arguments null": ('<tool_call>{"name": "f", "arguments": null}</tool_call>', "", [("f", "{}")]),
    "arguments null before the name": ('<tool_call>{"arguments": null, "name": "f"}</tool_call>', "", [("f", "{}")]),
    "no arguments": ('<tool_call>{"name": "f"}</tool_call>', "", [("f", "{}")]),
    "parameters": ('<tool_call>{"name": "f", "parameters": {"a": 1}}</tool_call>', "", [("f", '{"a": 1}')]),
    "parameters as a string, before the name": (
        r'<tool_call>{"parameters": "{\"a\": 1}", "name": "f"}</tool_call>',
        "",
        [("f", '{"a": 1}')],
    ),
    "arguments and parameters": (
        '<tool_call>{"name": "f", "parameters": {"a": 1}, "arguments": {"b": 2}}</tool_call>',
        "",
        [("f", '{"a": 1}')],
    ),
    "two objects": (
        '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n{"name": "g", "arguments": {}}\n</tool_call>\nDone.',
        "Done.",
        [("f", '{"a": 1}'), ("g", "{}")],
    ),
    "objects with too much between them": (
        '<tool_call>{"name": "f", "arguments": {"a": 1}}},\n{"name": "g"}},{"name": "h"}</tool_call>',
        "",
        [("f", '{"a": 1}'), ("g", "{}"), ("h", "{}")],
    ),
    "a list": (
        '<tool_call>\n[{"name": "f", "arguments": {"a": [1]}}, {"parameters": {}, "name": "g"}]\n</tool_call>'
        '<tool_call>{"name": "h"}</tool_call>',
        "",
        [("f", '{"a": [1]}'), ("g", "{}"), ("h", "{}")],
    ),
    "a list that never ends": ('<tool_call>[{"name": "f"}, {"name": "g"}', "", [("f", "{}"), ("g", "{}")]),
    "a second object that is no call": ('<tool_call>{"name": "f"}\n{"x": 1}</tool_call>.', ".", [("f", "{}")]),
    "a second object that is no call, never closed": (
        '<tool_call>{"name": "f"}\n{"x": 1} x',
        '{"x": 1} x',
        [("f", "{}")],
    ),
    "a second object that ends too early": ('<tool_call>{"name": "f"}, {"name": "g', ', {"name": "g', [("f", "{}")]),
    "more text than objects": ('<tool_call>{"name": "f"} or {"name": "g"}</tool_call>', "", [("f", "{}")]),
    "trailing comma in arguments": (
        '<tool_call>{"name": "f", "arguments": {"a": [1, 2,], "b": 1,},}</tool_call>',
        "",
        [("f", '{"a": [1, 2], "b": 1}')],
    ),
    "raw newlines in strings": (
        '<tool_call>{"na\tme": 1, "name": "f", "arguments": {"a": "x\n\ty"}}</tool_call>',
        "",
        [("f", '{"a": "x\\n\\ty"}')],
    ),
    "unknown escapes": (
        r'<tool_call>{"name": "f", "arguments": {"a": "\d+\u12"}}</tool_call>',
        "",
        [("f", r'{"a": "\\d+\\u12"}')],
    ),
    "half a surrogate pair in arguments": (
        '<tool_call>{"name": "f", "arguments": {"a": "\\ud83d"}}</tool_call>',
        "",
        [("f", '{"a": "\\ufffd"}')],
    ),
    "repairs in arguments as a string": (
        r'<tool_call>{"name": "f", "arguments": " {\"a\": \"x\ny\", \"b\": [1,} x"}</tool_call>',
        "",
        [("f", r'{"a": "x\ny", "b": [1]}')],
    ),
    "arguments as a string that ends too early": (
        r'<tool_call>{"name": "f", "arguments": "{\"a\": {\"b\": 1"}</tool_call>',
        "",
        [("f", '{"a": {"b": 1}}')],
    ),
    "arguments as a string that turns bad": (
        r'<tool_call>{"name": "f", "arguments": "{\"a\": 1, x \"b\": 2}"} x',
        "} x",
        [("f", '{"a": 1}')],
    ),
    "arguments as a string of spaces": (r'<tool_call>{"name": "f", "arguments": " \n"}</tool_call>', "", [("f", "{}")]),
    "arguments that turn bad": (
        '<tool_call>{"name": "f", "arguments": {"a": 1, "b": celsius, "c": 2}}</tool_call>',
        "",
        [("f", '{"a": 1}')],
    ),
    "arguments that turn bad, never closed": (
        '<tool_call>{"name": "f", "arguments": {"a": 1, "b": celsius}} x',
        "celsius}} x",
        [("f", '{"a": 1}')],
    ),
    "an escape in the name that JSON does not know": (r'<tool_call>{"name": "\x"}</tool_call>', "", [(r"\x", "{}")]),
    "no opening brace": ('<tool_call>\n"name": "f", "arguments": {"a": {}}}\n</tool_call>', "", [("f", '{"a": {}}')]),
    "no closing brace": ('<tool_call>\n{"name": "f", "arguments": {"a": {}}\n</tool_call>', "", [("f", '{"a": {}}')]),
    "no outer braces": ('<tool_call>\n"name": "f", "arguments": {"a": {}}\n</tool_call>', "", [("f", '{"a": {}}')]),
    "no outer braces, null": ('<tool_call>"name": "f", "arguments": null</tool_call>', "", [("f", "{}")]),
    "only a name, no braces": ('<tool_call>"name": "f"</tool_call>', "", [("f", "{}")]),
    "too many closing braces": (
        '<tool_call>{"name": "f", "arguments": {"a": 1}}}}\n</tool_call>\n',
        "",
        [("f", '{"a": 1}')],
    ),
    "missing comma": ('<tool_call>{"name": "f" "arguments": {"a": 1}}</tool_call>', "", [("f", '{"a": 1}')]),
    "trailing comma": ('<tool_call>{"name": "f", "arguments": {"a": 1},}</tool_call>', "", [("f", '{"a": 1}')]),
    "text before": (
        'Let me look.\n\n<tool_call>{"name": "f", "arguments": {}}</tool_call>',
        "Let me look.",
        [("f", "{}")],
    ),
    "text before without a newline": ('Look:<tool_call>{"name": "f"}</tool_call>', "Look:", [("f", "{}")]),
    "text on both sides": (
        'One.\n<tool_call>{"name": "f"}</tool_call>\n\n Two.\n<tool_call>{"name": "g"}</tool_call>\nThree.\n',
        "One.\n\n\nTwo.\n\nThree.\n",
        [("f", "{}"), ("g", "{}")],
    ),
    "text after only": ('\n<tool_call>{"name": "f"}</tool_call>\nDone.', "Done.", [("f", "{}")]),
    "never closed": ('<tool_call>{"name": "f", "arguments": {"a": 1}}\n', "", [("f", '{"a": 1}')]),
    "never closed, text after": (
        '<tool_call>{"name": "f", "arguments": {"a": 1}}\nDone.',
        "Done.",
        [("f", '{"a": 1}')],
    ),
    "never closed, another opens": (
        '<tool_call>{"name": "f", "arguments": {"a": 1}}\n<tool_call>{"name": "g", "arguments": {"b": 2}}</tool_call>',
        "",
        [("f", '{"a": 1}'), ("g", '{"b": 2}')],
    ),
    "another opens within": (
        '<tool_call>{"name": "f", "arguments": {"a": "<tool_call>{"name": "g", "arguments": {"b": 2}}</tool_call>',
        "",
        [("f", '{"a": ""}'), ("g", '{"b": 2}')],
    ),
    "arguments that never end": (
        '<tool_call>{"name": "f", "arguments": {"a": [1, 2}</tool_call>Done.',
        "Done.",
        [("f", '{"a": [1, 2]}')],
    ),
    "unreadable after the name": (
        '<tool_call>{"name": "f", "arguments": {"a": 1}, oops: 12 </tool_call>Done.',
        "Done.",
        [("f", '{"a": 1}')],
    ),
    "a key that nobody knows": ('<tool_call>{"name": "f", "\\x": "1"}</tool_call>', "", [("f", "{}")]),
    "unreadable after the name, never closed": (
        '<tool_call>{"name": "f", "arguments": {"a": 1}, "b": nope 12} x',
        'nope 12} x',
        [("f", '{"a": 1}')],
    ),
    "a closing marker in the next call's place": (
        '<tool_call>{"name": "f"}</tool_call></tool_call>',
        "</tool_call>",
        [("f", "{}")],
    ),
}  # fmt: skip

NOT_CALLS = {
    "not JSON": "<tool_call>\nget_weather(Paris)\n</tool_call>\n",
    "no name": '<tool_call>{"arguments": {"a": 1}}</tool_call>',
    "empty": "<tool_call>\n</tool_call>",
    "an empty name": '<tool_call>{"name": " ", "arguments": {}}</tool_call>',
    "a name that is no string": '<tool_call>{"name": 5, "arguments": {}}</tool_call>',
    "a name that is an object": '<tool_call>{"name": {"name": "f"}}</tool_call>',
    "an array of something else": '<tool_call>["name", "f"]</tool_call>',
    "an array in an array": '<tool_call>[[{"name": "f"}]]</tool_call>',
    "an array that is not one": '<tool_call>["name": "f", "arguments": {"a": 1}]</tool_call>',
    "too much before the object": '<tool_call>]{"name": "f", "arguments": {"a": 1}}</tool_call>',
    "arguments that are an array": '<tool_call>{"name": "f", "arguments": [1, "]"]}</tool_call>',
    "arguments that are a number": '<tool_call>{"name": "f", "arguments": -1.5e3}</tool_call>',
    "arguments that are a word": '<tool_call>{"name": "f", "arguments": none}</tool_call>',
    "arguments that are a string of no object": '<tool_call>{"name": "f", "arguments": "[{}]"}</tool_call>',
    "arguments that are a string of half an object": '<tool_call>{"name": "f", "arguments": "{"}</tool_call>',
    "arguments in single quotes": """<tool_call>{"name": "f", "arguments": {'a': 1}}</tool_call>""",
    "bad arguments before the name": '<tool_call>{"arguments": {"a": 1, b: 2}, "name": "f"}</tool_call>',
    "arguments that only begin": '<tool_call>{"name": "f", "arguments": {"a": </tool_call>',
    "arguments of a bracket": '<tool_call>{"name": "f", "arguments": {',
    "a scalar that is none, after the name": '<tool_call>{"name": "f", "x": tru, 1}</tool_call>',
    "no colon": '<tool_call>{"name" "f"}</tool_call>',
    "no value": '<tool_call>{"arguments": , "name": "f"}</tool_call>',
    "a scalar that is none": '<tool_call>{"arguments": nul, "name": "f"}</tool_call>',
    "cut off in a key": '<tool_call>\n{"na',
    "cut off in the name": '<tool_call>\n{"name": "get_wea',
    "cut off before the name": '<tool_call>\n{"arguments": {"a": 1}, ',
    "cut off at once": "Well.\n\n<tool_call>",
    "closed in the name": '<tool_call>{"name": "f</tool_call>',
    "opened twice": '<tool_call><tool_call>{"name": "',
    "nothing but a closing marker": "Well.</tool_call>\n",
    "text around": 'A\n<tool_call>x</tool_call>\nB<tool_call>{"a"',
}


@pytest.mark.parametrize("spelled", [(), SPELLED, (CLOSE,)], ids=["tokens", "text", "half"])
@pytest.mark.parametrize(("text", "content", "functions"), WELL.values(), ids=WELL)
def test_calls(text: str, content: str, functions: list[tuple[str, str]], spelled: tuple[str, ...]) -> None:
    text = "Thought.\n</think>\n\n" + text
    for places in ([], every_byte(text), every_byte(text)[::3]):
        shown = run(text, places, tools=True, spelled=spelled)
        assert shown.functions == functions
        assert (shown.reasoning, shown.content, shown.finish_reason) == ("Thought.", content, "tool_calls")


@pytest.mark.parametrize("spelled", [(), SPELLED, (CLOSE,)], ids=["tokens", "text", "half"])
@pytest.mark.parametrize("text", NOT_CALLS.values(), ids=NOT_CALLS)
def test_what_is_no_call_is_text_as_written(text: str, spelled: tuple[str, ...]) -> None:
    for finish in ("stop", "length"):
        for places in ([], every_byte(text)):
            shown = run("</think>\n\n" + text, places, tools=True, finish=finish, spelled=spelled)
            assert (shown.calls, shown.content, shown.finish_reason) == ([], text, finish)


@given(
    text=st.lists(
        st.sampled_from(
            [*"{}[]\",:\\ \nx1<>/", OPEN, CLOSE, '"name": "f"', '"arguments": ', '{"name":', "null", "\\u12", "\\ud83d",
             "</think>", "é", *(text for text, _, _ in WELL.values()), *NOT_CALLS.values()]
        ), max_size=12
    ).map("".join),
    places=cuts,
    takes=st.lists(st.integers(0, 200)),
    finish=st.sampled_from(["stop", "length"]),
    spelled=st.sampled_from([(), SPELLED, (OPEN,), (CLOSE,)]),
    thinking=st.booleans(),
    parallel=st.booleans(),
    stop=st.sampled_from([(), ("x",), ("}\n", "\n\n"), ("<tool", "e</t")]),
    functions=st.sampled_from([(), ("f", "g")]),
)  # fmt: skip
@example(OPEN + '{"name": "f", "arguments": "' + "\\ud83d" * 3, [1, 2, 3, 50], [], "stop", SPELLED, False, True, (), ())
def test_any_cut_streams_what_the_whole_is(
    text: str,
    places: list[int],
    takes: list[int],
    finish: str,
    spelled: tuple[str, ...],
    thinking: bool,
    parallel: bool,
    stop: tuple[str, ...],
    functions: tuple[str, ...],
) -> None:
    options: dict[str, Any] = {"tools": True, "functions": functions, "thinking": thinking}
    options |= {"parallel_tool_calls": parallel, "stop": stop}
    whole = run(text, finish=finish, spelled=spelled, takes=[], **options)
    pieces = run(text, places, finish=finish, spelled=spelled, takes=takes, **options)
    fine = run(text, every_byte(text), finish=finish, spelled=spelled, **options)
    for shown in (pieces, fine):
        assert (shown.reasoning, shown.content) == (whole.reasoning, whole.content)
        assert (shown.calls, shown.finish_reason) == (whole.calls, whole.finish_reason)


# Without "<", of which a marker could come.
texts = st.text(st.characters(codec="utf-8", exclude_characters="<"))
values = json_values(texts)
functions = st.lists(st.tuples(texts.filter(str.strip), st.dictionaries(texts, values, max_size=3)), max_size=3)


@given(functions, st.booleans(), st.booleans(), st.booleans(), st.sampled_from([None, 2]), cuts)
def test_any_json_comes_out_as_json_reads_it(
    calls: list[tuple[str, dict[str, Any]]],
    ascii_only: bool,
    quoted: bool,
    name_last: bool,
    indent: int | None,
    places: list[int],
) -> None:
    written = []
    for name, arguments in calls:
        value = json.dumps(arguments, ensure_ascii=ascii_only) if quoted else arguments
        fields = [("name", name), ("arguments", value)]
        body = json.dumps(dict(fields[::-1] if name_last else fields), ensure_ascii=ascii_only, indent=indent)
        written.append(f"<tool_call>\n{body}\n</tool_call>")
    shown = run("</think>" + "\n".join(written), places, tools=True)
    assert [(name, json.loads(arguments)) for name, arguments in shown.functions] == calls
    assert shown.content == ""
    assert shown.finish_reason == ("tool_calls" if calls else "stop")


def test_a_call_is_reported_as_soon_as_its_arguments_have_a_value() -> None:
    text = '</think><tool_call>{"name": "get_weather", "arguments": {"city": "Paris"}}</tool_call>'
    begun = text.index('Paris"')
    shown = run(text[:begun], every_byte(text), tools=True, finish="length")
    assert shown.functions == [("get_weather", '{"city": ""}')]
    shown = run(text[: begun - 1], every_byte(text), tools=True, finish="length")
    assert (shown.calls, shown.content, shown.finish_reason) == ([], text[len("</think>") : begun - 1], "length")


@pytest.mark.parametrize(
    ("written", "shown"),
    [
        ('{"city": "', '{"city": ""}'),
        ('{"city": "Par{i', '{"city": "Par{i"}'),
        ('{"city": "Par{is\\', '{"city": "Par{is"}'),
        ('{"city": "Par{is", ', '{"city": "Par{is"}'),
        ('{"city": "Par{is", "n": 1', '{"city": "Par{is"}'),
        ('{"city": "Par{is", "n": 1 ', '{"city": "Par{is", "n": 1}'),
        ('{"city": "Par{is", "n": [[1, {"m', '{"city": "Par{is", "n": [[1]]}'),
        ('{"city": "Par{is"}', '{"city": "Par{is"}'),
        ('{"city": "Par{is"}}', '{"city": "Par{is"}'),
        ("{}", "{}"),
    ],
)
def test_a_call_that_is_cut_off_is_closed(written: str, shown: str) -> None:
    text = '</think><tool_call>{"name": "f", "arguments": ' + written
    for places in ([], every_byte(text)):
        answer = run(text, places, tools=True, finish="length")
        assert (answer.functions, answer.content, answer.finish_reason) == ([("f", shown)], "", "length")


def test_a_cut_off_call_without_arguments_is_none() -> None:
    text = '<tool_call>{"name": "f"'
    shown = run("</think>" + text, tools=True, finish="length")
    assert (shown.calls, shown.content) == ([], text)
    assert run("</think>" + text, tools=True, finish="stop").functions == [("f", "{}")]


def test_arguments_stream_as_they_are_written() -> None:
    pieces: list[str | bytes] = [
        "</think>",
        OPEN,
        b'{"name": "f",',
        b' "arguments": {',
        b'"a',
        b'": "',
        b"x",
        b'y", "b"',
    ]
    pieces += [b": [", b"1", b"2,", b"], ", b"}", b"}", CLOSE]
    tokenizer = StandIn([piece for piece in pieces if isinstance(piece, bytes)])
    answer = Answer(request(tools=True), Vocabulary(tokenizer), Parsers())
    streamed = []
    for token in tokenizer.tokens(pieces):
        answer.push(token)
        delta = answer.take()
        streamed.append("".join(piece.arguments for piece in delta.tool_calls) if delta else None)
    expected = [None] * 5 + ['{"a": "', "x", 'y"', None, None, ', "b": [12', "]", " }", None, None]
    assert streamed == expected


def test_ids_are_the_same_on_every_replay_and_differ_between_calls() -> None:
    text = '</think><tool_call>{"name": "f"}</tool_call><tool_call>{"name": "f"}</tool_call>'
    ids = [call_id for call_id, _, _ in run(text, tools=True).calls]
    assert ids == [call_id("r1", 0), call_id("r1", 1)]
    assert len(set(ids)) == 2
    assert all(len(one) == 29 and one.startswith("call_") for one in ids)
    assert call_id("r2", 0) != ids[0]


def test_parallel_calls_off_shows_the_first_only() -> None:
    text = (
        '</think>A<tool_call>x</tool_call><tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>'
        '<tool_call>{"arguments": {"b": 2}, "name": "g"}</tool_call>\nB'
    )
    for places in ([], every_byte(text)):
        shown = run(text, places, tools=True, parallel_tool_calls=False)
        assert shown.functions == [("f", '{"a": 1}')]
        assert shown.content == "A<tool_call>x</tool_call>\nB"
        assert shown.finish_reason == "tool_calls"


@pytest.mark.parametrize(
    "options", [{"tools": False}, {"tools": True, "parsers": Parsers(tool_calls=False)}], ids=["no tools", "no parser"]
)
def test_without_tools_a_call_is_text(options: dict[str, Any]) -> None:
    text = '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>\n'
    shown = run("a\n</think>\n\n" + text, every_byte(text), **options)
    assert (shown.content, shown.calls, shown.finish_reason) == (text, [], "stop")


def test_a_marker_spelled_by_ordinary_tokens_is_text_where_it_is_a_token() -> None:
    shown = run_pieces(["</think>", b"<tool_call>", b'{"name": "f"}', b"</tool_call>"], tools=True)
    assert (shown.calls, shown.content) == ([], '<tool_call>{"name": "f"}</tool_call>')
    body = b'{"name": "f", "arguments": {"a": "<tool_call></tool_call>"}}'
    shown = run_pieces(["</think>", OPEN, body, CLOSE, b"."], tools=True)
    assert (shown.functions, shown.content) == ([("f", '{"a": "<tool_call></tool_call>"}')], ".")


def test_newlines_around_a_call_are_shown_between_texts_even_if_the_first_was_plain() -> None:
    shown = run_pieces([b"One.", b"\n", OPEN, b'{"name": "f"}', CLOSE, b"\n", b"Two."], tools=True, thinking=False)
    assert (shown.content, shown.functions) == ("One.\n\nTwo.", [("f", "{}")])


def test_half_a_character_before_a_call() -> None:
    shown = run_pieces(["</think>", b"a\xe2", OPEN, b'{"name": "f', b"\xe2\x82", b'"}', CLOSE, b"\x82"], tools=True)
    assert (shown.functions, shown.content) == ([("f\ufffd", "{}")], "a\ufffd\ufffd")
