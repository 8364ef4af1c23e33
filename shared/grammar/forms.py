"""Forms in which clients state a grammar, each as a rule of llguidance, and the text that a message carries.

The text is llguidance's list of grammars as JSON: the first is the answer, and may name others as `@name`.
"""

import json
from collections.abc import Iterable
from typing import Any

from llguidance import grammar_from, regex_to_lark

Rule = dict[str, Any]  # one grammar: {"json_schema": ...} or {"lark_grammar": ...}

ANSWER = "answer"
# The model writes blank lines between </think> and its answer. They are not part of the content, and need not be there.
_AFTER_THINKING: Rule = {"lark_grammar": f"start: BLANK? @{ANSWER}\nBLANK: /\\n{{1,2}}/\n"}
# One space, or a new line and its indentation. In unbounded white space a model can be lost until its token limit.
WHITE_SPACE = r" ?|\n[ \t]{0,64}"
# The formats that JSON Schema defines. Others are annotations by its rules: they allow every value.
_FORMATS = frozenset(
    {"date-time", "date", "time", "duration", "email", "idn-email", "hostname", "idn-hostname", "ipv4", "ipv6"}
    | {"uri", "uri-reference", "iri", "iri-reference", "uuid", "uri-template", "json-pointer", "relative-json-pointer"}
    | {"regex"}
)
_VALUES = frozenset({"const", "enum", "default", "examples", "example"})  # keywords whose values are no schemas


def json_schema(schema: Any, white_space: str = WHITE_SPACE) -> Rule:
    """Return the rule of the JSON texts that a schema (an object or a boolean) allows."""
    # A client's own options of the library could make it ignore what it cannot express.
    own = {} if schema is True else _without_annotations(schema)
    if isinstance(own, dict):
        own = own | {"x-guidance": {"whitespace_pattern": white_space}}
    return {"json_schema": own}


def json_object() -> Rule:
    """Return the rule of any JSON object."""
    return json_schema({"type": "object"})


def regex(pattern: str) -> Rule:
    r"""Return the rule of the texts that match `pattern` as a whole. \d is an ASCII digit, as in JSON Schema."""
    return {"lark_grammar": f"start: /{regex_to_lark(pattern, 'd')}/"}


def choice(options: Iterable[str]) -> Rule:
    """Return the rule of exactly these texts. One terminal for all of them: thousands of rules would be too complex."""
    texts = " | ".join(json.dumps(option, ensure_ascii=False) for option in options)
    return {"lark_grammar": f"start: OPTION\nOPTION: {texts}\n"}


def context_free(text: str) -> Rule:
    """Return the rule of a grammar in Lark's notation or in GBNF (EBNF as llama.cpp and xgrammar write it).

    Raises:
        ValueError: it is neither.
    """
    return {"lark_grammar": grammar_from("grammar", text)}


def write(answer: Rule, thinking: bool, parts: dict[str, Rule] | None = None) -> str:
    """Return the text of `Grammar`.

    Args:
        thinking: the grammar begins after </think>.
        parts: rules that `answer` names as `@name`.
    """
    named = [{"name": ANSWER} | answer, *({"name": name} | rule for name, rule in (parts or {}).items())]
    first = [{"name": "after_thinking"} | _AFTER_THINKING] if thinking else []
    return json.dumps({"grammars": first + named}, ensure_ascii=False)


def _without_annotations(schema: Any) -> Any:
    """Return a schema without the formats that JSON Schema does not define."""
    if isinstance(schema, list):
        return [_without_annotations(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        keyword: value if keyword in _VALUES else _without_annotations(value)
        for keyword, value in schema.items()
        if keyword != "format" or not isinstance(value, str) or value in _FORMATS
    }
