"""Grammars over the demo's vocabulary: which texts each form allows, and which tokens."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest

from shared.grammar import forms, structural_tag
from shared.grammar.compiler import GrammarCompiler, GrammarError
from shared.grammar.forms import Rule
from shared.model.tokenizer import Tokenizer

DEMO = Path(__file__).resolve().parents[3] / "cli" / "demo_checkpoint"


@cache
def tokenizer() -> Tokenizer:
    return Tokenizer.load(DEMO)


@cache
def compiler() -> GrammarCompiler:
    return GrammarCompiler(tokenizer(), tokenizer().vocab_size, (2,))


def allows(text: str, answer: str | list[int]) -> bool:
    """Whether the whole of an answer, as text or ids, matches a grammar."""
    ids = tokenizer().encode_text(answer) if isinstance(answer, str) else answer
    matcher = compiler().compile(text)
    return (not ids or matcher.consume_tokens(ids)) and matcher.is_accepting()


SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}
# Of z.email() until zod 4.3, and of z.emoji().
ZOD_EMAIL = r"^(?!\.)(?!.*\.\.)([A-Za-z0-9_'+\-\.]*)[A-Za-z0-9_+-]@([A-Za-z0-9][A-Za-z0-9\-]*\.)+[A-Za-z]{2,}$"
ZOD_EMOJI = (
    r"^(?=[\s\S]*[\p{Extended_Pictographic}\p{Regional_Indicator}\u20E3])"
    r"[\p{Extended_Pictographic}\p{Emoji_Component}]+$"
)
CASES: list[tuple[Rule, list[str], list[str]]] = [
    (
        forms.json_schema(SCHEMA),
        ['{"a":1}', '{"a": -12}', '{ "a" : 1 }', '{\n  "a": 1\n}'],
        ['{"a":1.5}', "{}", '{"a":1,"b":2}', '{"a":1} ', '{"a":   1}', '\n{"a":1}'],
    ),
    (forms.json_object(), ["{}", '{"x":[1,{"y":null}]}'], ["[]", "1", ""]),
    (forms.json_schema(True), ["1", "[]", '"é"', "null"], ["nul", ""]),
    (forms.json_schema(SCHEMA, ""), ['{"a":1}'], ['{"a": 1}']),
    (forms.regex(r"a/b\d{2}|"), ["a/b12", ""], ["a/b1", "a/b123", "a/b1\u07c1"]),
    (forms.regex("^(a|b)+$\\n"), ["ab\n"], ["ab", "\n", "ab\n\n"]),
    (forms.regex(r"(?=.*\d)(?=.*/)[a-z\d/]{2,4}"), ["a/1", "1/"], ["a/", "ab1", "a/b1c"]),
    (
        forms.json_schema({"type": "string", "pattern": r"^(?=.*[A-Z])(?=.{2}$).*$", "allOf": [{"pattern": "b"}]}),
        ['"Ab"', '"bA"'],
        ['"ab"', '"A"', '"AAb"', '"AB"'],
    ),
    (
        forms.json_schema({"type": "string", "pattern": ZOD_EMAIL}),
        ['"a.b@c.de"'],
        ['"a..b@c.de"', '".a@c.de"', '"a@c.d"'],
    ),
    (forms.json_schema({"type": "string", "pattern": ZOD_EMOJI}), ['"\U0001f600"', '"1\u20e3"'], ['"1"', '""', '"a"']),
    (forms.choice(["yes", "yesterday", 'a"\n', "é", ""]), ["yes", "yesterday", 'a"\n', "é", ""], ["ye", "yes "]),
    (forms.context_free('root ::= "a" b*\nb ::= [0-9] | "(" b ")"\n'), ["a", "a1(2)"], ["", "b", "a(1"]),
    (forms.context_free('?start: x\n?x: "a" | "b"\n'), ["a", "b"], ["", "ab"]),
    (forms.context_free('start: "x" %json {"type": "integer"}'), ["x1"], ["x", "1"]),
]


@pytest.mark.parametrize(("rule", "good", "bad"), CASES)
def test_a_form_allows_what_it_says(rule: Rule, good: list[str], bad: list[str]) -> None:
    text = forms.write(rule, thinking=False)
    assert [answer for answer in good if not allows(text, answer)] == []
    assert [answer for answer in bad if allows(text, answer)] == []


@pytest.mark.parametrize("blank", ["", "\n", "\n\n"])
def test_blank_lines_may_follow_the_thinking(blank: str) -> None:
    text = forms.write(forms.json_object(), thinking=True)
    assert allows(text, blank + "{}")
    assert not allows(text, "\n\n\n{}")
    assert not allows(text, "{}" + blank) or not blank


def test_text_never_matches_a_control_token() -> None:
    call = tokenizer().control["<tool_call>"]
    free = forms.write(forms.regex(r"(.|\n)*"), thinking=False)
    assert allows(free, "<tool_call>"), "its spelling is text"
    assert not allows(free, [call])


def test_formats_that_json_schema_does_not_define_are_annotations() -> None:
    schema = {"type": "object", "properties": {"format": {"type": "string", "format": "password"}}}
    assert allows(forms.write(forms.json_schema(schema), thinking=False), '{"format":"x"}')
    for kept in ({"format": "idn-email"}, {"properties": {"a": {"format": "iri"}}}):
        with pytest.raises(GrammarError, match="Unknown format"):
            compiler().compile(forms.write(forms.json_schema(kept | {"type": ["string", "object"]}), thinking=False))
    constant = {"const": {"format": "password"}}
    assert allows(forms.write(forms.json_schema(constant), thinking=False), '{"format":"password"}')


def test_a_clients_options_of_the_library_do_not_count() -> None:
    schema = {"not": {}, "x-guidance": {"lenient": True}}
    with pytest.raises(GrammarError, match="not"):
        compiler().compile(forms.write(forms.json_schema(schema), thinking=False))


# ---------------------------------------------------------------------------------------------------- structural tags

CALLS = {
    "structures": [
        {"begin": "<tool_call>", "schema": SCHEMA, "end": "</tool_call>"},
        {"begin": "<f=a>", "schema": {"type": "null"}, "end": "</f>"},
        {"begin": "<f=b>", "schema": {"type": "boolean"}, "end": "</f>"},
    ],
    "triggers": ["<tool_call>", "<f"],
}


def tagged(given: dict[str, Any], answer: str) -> bool:
    """Whether an answer, in which control tokens are named, matches a structural tag."""
    text = structural_tag.write(structural_tag.read(given), tokenizer().control, thinking=False)
    return allows(text, tokenizer().encode_template(answer))


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("any text < tool", True),
        ('so <tool_call>{"a":1}</tool_call> then <f=b>true</f>.', True),
        ("<f=a>null</f><f=a>null</f>", True),
        ("<f=a>true</f>", False),
        ("<f=c>true</f>", False),
        ('<tool_call>{"a":1}', False),
        ('<tool_call>{"a":""}</tool_call>', False),
    ],
)
def test_the_older_structural_tag(answer: str, right: bool) -> None:
    assert tagged(CALLS, answer) is right


def tag(begin: str, content: dict[str, Any], end: str) -> dict[str, Any]:
    return {"type": "tag", "begin": begin, "content": content, "end": end}


NUMBER = tag("<tool_call>", {"type": "regex", "pattern": "[0-9]+"}, "</tool_call>")
TEXT = tag("<t>", {"type": "any_text"}, "</t>")
FORMATS: list[tuple[dict[str, Any], list[str], list[str]]] = [
    ({"type": "const_string", "value": "a<tool_call>b"}, ["a<tool_call>b"], ["a", ""]),
    (TEXT, ["<t>x < y</t>", "<t></t>"], ["<t>x</t>y", "<t>x"]),
    ({"type": "or", "elements": [NUMBER, TEXT]}, ["<tool_call>12</tool_call>", "<t>x</t>"], ["x", ""]),
    (
        {"type": "sequence", "elements": [NUMBER, {"type": "const_string", "value": "!"}, {"type": "any_text"}]},
        ["<tool_call>1</tool_call>!", "<tool_call>1</tool_call>! and so"],
        ["<tool_call>1</tool_call>"],
    ),
    (
        {"type": "tags_with_separator", "tags": [NUMBER], "separator": "\n", "at_least_one": True},
        ["<tool_call>1</tool_call>", "<tool_call>1</tool_call>\n<tool_call>2</tool_call>"],
        ["", "<tool_call>1</tool_call><tool_call>2</tool_call>"],
    ),
    (
        {"type": "triggered_tags", "triggers": ["<tool_call>"], "tags": [NUMBER], "at_least_one": True},
        ["<tool_call>1</tool_call>", "so <tool_call>1</tool_call> and <tool_call>2</tool_call>"],
        ["", "so"],
    ),
    (
        {"type": "triggered_tags", "triggers": ["<tool_call>"], "tags": [NUMBER], "stop_after_first": True},
        ["", "so", "so <tool_call>1</tool_call>"],
        ["<tool_call>1</tool_call>!", "<tool_call>1</tool_call><tool_call>1</tool_call>"],
    ),
    ({"type": "json_schema", "json_schema": SCHEMA}, ['{"a":1}'], ["{}"]),
    ({"type": "grammar", "grammar": 'root ::= "x" [0-9]'}, ["x1"], ["x"]),
]


@pytest.mark.parametrize(("given", "good", "bad"), FORMATS)
def test_the_formats_of_a_structural_tag(given: dict[str, Any], good: list[str], bad: list[str]) -> None:
    assert [answer for answer in good if not tagged({"format": given}, answer)] == []
    assert [answer for answer in bad if tagged({"format": given}, answer)] == []


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"format": {"type": "qwen_xml_parameter"}}, "qwen_xml_parameter"),
        ({"format": {"type": "or", "elements": []}}, "is empty"),
        ({"format": {"type": "sequence", "elements": [{"type": "any_text"}, NUMBER]}}, "any_text must be"),
        ({"structures": [{"begin": "<a>", "schema": {}, "end": ""}], "triggers": ["<b>"]}, "no trigger begins"),
        ({}, "missing required field `format`"),
    ],
)
def test_a_structural_tag_that_contradicts_itself_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        structural_tag.write(structural_tag.read(given), {}, thinking=False)
