"""Random JSON Schemas of the kinds that tools and answers have, and what is checked against them.

Each can be met, and its strings are bounded, so that most answers of a random model come to their end.
"""

import json
from typing import Any

import jsonschema
from hypothesis import strategies as st

Schema = dict[str, Any]

NAMES = ["a", "b c", 'd"', "é"]
PATTERNS = ["^[a-c]{2}x?$", "^(ab|cd)+[0-9]$", "^.{1,3}$"]
FORMATS = ["ipv4", "uuid", "email"]  # not `date`: a grammar has a 29th of February in every year

texts = st.text(st.characters(codec="utf-8", max_codepoint=0x1FF), max_size=4)  # whose bytes are all tokens
integers = st.builds(
    lambda low, span: {"type": "integer", "minimum": low, "maximum": low + span},
    st.integers(-9, 99),
    st.integers(0, 99),
)
strings = st.builds(
    lambda least, more: {"type": "string", "minLength": least, "maxLength": least + more},
    st.integers(0, 3),
    st.integers(0, 4),
)
scalars = st.one_of(
    st.sampled_from([{"type": "integer"}, {"type": "number"}, {"type": "boolean"}, {"type": "null"}, {"const": "é\n"}]),
    integers,
    strings,
    st.sampled_from([{"type": "string", "pattern": pattern} for pattern in PATTERNS]),
    st.sampled_from([{"type": "string", "format": name} for name in FORMATS]),
    st.builds(lambda n: {"type": "integer", "multipleOf": n}, st.integers(1, 9)),
    st.builds(lambda low: {"type": "number", "exclusiveMinimum": low, "maximum": low + 1}, st.integers(-5, 5)),
    st.builds(lambda values: {"enum": values}, st.lists(st.one_of(st.integers(), texts), min_size=1)),
    st.builds(lambda each: {"type": ["null", each["type"]], **{k: v for k, v in each.items() if k != "type"}}, strings),
    st.sampled_from([{"const": {"a": [1, None]}}, {"type": ["string", "integer"], "maxLength": 3, "minimum": 7}]),
)


def _nested(inner: st.SearchStrategy[Schema]) -> st.SearchStrategy[Schema]:
    arrays = st.builds(
        lambda items, least, more: {"type": "array", "items": items, "minItems": least, "maxItems": least + more},
        *(inner, st.integers(0, 2), st.integers(0, 2)),
    )
    tuples = st.builds(
        lambda each: {"type": "array", "prefixItems": each, "items": False, "minItems": len(each)},
        st.lists(inner, min_size=1, max_size=3),
    )
    objects = st.builds(
        lambda properties, required, more: {
            "type": "object",
            "properties": properties,
            "required": [name for name in properties if name in required],
            "additionalProperties": more,
        },
        *(st.dictionaries(st.sampled_from(NAMES), inner, max_size=3), st.sets(st.sampled_from(NAMES)), st.booleans()),
    )
    either = st.builds(lambda each: {"anyOf": each}, st.lists(inner, min_size=1, max_size=2))
    tagged = st.builds(
        lambda first, second: {"oneOf": [_tagged("x", first), _tagged("y", second)]}, inner, inner
    )  # which exclude each other
    return st.one_of(arrays, tuples, objects, either, tagged)


def _tagged(kind: str, value: Schema) -> Schema:
    return {
        "type": "object",
        "properties": {"kind": {"const": kind}, "value": value},
        "required": ["kind", "value"],
        "additionalProperties": False,
    }


def _referred(schema: Schema) -> Schema:
    return {
        "type": "array",
        "items": {"$ref": "#/$defs/each"},
        "minItems": 1,
        "maxItems": 2,
        "$defs": {"each": schema},
    }


_plain = st.recursive(scalars, _nested, max_leaves=6)
schemas = st.one_of(_plain, _plain, st.builds(_referred, _plain))


def check_answer(text: str | bytes, schema: Schema) -> None:
    """Check the JSON of a whole answer, its formats too."""
    validator = jsonschema.Draft202012Validator
    validator(schema, format_checker=validator.FORMAT_CHECKER).validate(json.loads(text))
