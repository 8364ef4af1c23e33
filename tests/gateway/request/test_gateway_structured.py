"""One grammar from the fields in which clients state it, some of them in two at once."""

import json
from typing import Any

import pytest
from whole_parser import WholeParser

from shared.errors import RequestError
from shared.messages import Grammar

SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
LARK = 'start: x\nx[capture]: X\n\nX: "yes"\n     | "no"\n'


def grammar(parser: WholeParser, **fields: Any) -> Grammar:
    body = {"messages": [{"role": "user", "content": "Hi"}], "enable_thinking": False, **fields}
    made = parser.parse(json.dumps(body).encode()).sampling.grammar
    assert made is not None
    return made


@pytest.mark.parametrize(
    "shaped",
    [
        {"type": "json_schema", "json_schema": {"schema": SCHEMA}},
        {"type": "json_schema", "schema": SCHEMA},
        {"type": "json_object", "schema": SCHEMA},
    ],
)
def test_a_schema_in_any_response_format_is_enforced(parser: WholeParser, shaped: dict[str, Any]) -> None:
    assert grammar(parser, response_format=shaped).text == grammar(parser, guided_json=SCHEMA).text


def test_any_object_is_another_grammar(parser: WholeParser) -> None:
    for schema in ({}, {"schema": None}, {"schema": {}}, {"schema": {"type": "object"}}):
        shaped = {"type": "json_object", **schema}
        assert grammar(parser, response_format=shaped).text == grammar(parser, guided_json={"type": "object"}).text
    assert grammar(parser, guided_json=SCHEMA).text != grammar(parser, guided_json={"type": "object"}).text


def test_an_object_is_one_whatever_its_schema_leaves_out(parser: WholeParser) -> None:
    shaped = {"type": "json_object", "schema": {"required": ["a"]}}
    whole = {"required": ["a"], "type": "object"}
    assert grammar(parser, response_format=shaped).text == grammar(parser, guided_json=whole).text
    assert grammar(parser, response_format=shaped, guided_json=whole).text == grammar(parser, guided_json=whole).text
    with pytest.raises(RequestError, match="must be an object, not 'array'") as refused:
        grammar(parser, response_format={"type": "json_object", "schema": {"type": "array"}})
    assert refused.value.failure.param == "response_format.schema"


def test_a_schema_that_is_missing_is_named(parser: WholeParser) -> None:
    with pytest.raises(RequestError) as refused:
        grammar(parser, response_format={"type": "json_schema"})
    assert refused.value.failure.param == "response_format.json_schema"


@pytest.mark.parametrize(
    ("older", "newer"),
    [
        ({"guided_grammar": LARK, "guided_decoding_backend": "guidance"}, {"grammar": LARK}),
        ({"guided_json": SCHEMA}, {"json": SCHEMA}),
        ({"regex": "[0-9]"}, {"regex": "[0-9]"}),
    ],
)
def test_a_grammar_that_is_stated_twice_is_one(
    parser: WholeParser, older: dict[str, Any], newer: dict[str, Any]
) -> None:
    """guidance writes the fields of older and of newer vLLM servers at once."""
    assert grammar(parser, **older, structured_outputs=newer) == grammar(parser, **older)


def test_two_grammars_are_refused(parser: WholeParser) -> None:
    with pytest.raises(RequestError) as refused:
        grammar(parser, guided_regex="[0-9]", structured_outputs={"regex": "[a-z]"})
    assert refused.value.failure.param == "structured_outputs.regex"
