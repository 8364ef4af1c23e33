"""Forms in which clients state a grammar, each as a rule of llguidance, and the text that a message carries.

The text is llguidance's list of grammars as JSON: the first is the answer, and may name others as `@name`.
"""

import json
import re
from collections.abc import Iterable
from typing import Any

from llguidance import grammar_from, regex_to_lark

from shared.grammar.patterns import searched_patterns, whole_patterns

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
# Lark's mark of a rule that has no place in a tree, of which there is none here. By it the library takes Lark for GBNF.
_INLINED_START = re.compile(r"^([ \t]*)\?start(?=[ \t]*:(?!:=))", re.MULTILINE)
_VALUES = frozenset({"const", "enum", "default", "examples", "example"})  # keywords whose values are no schemas


def json_schema(schema: Any, white_space: str = WHITE_SPACE) -> Rule:
    """Return the rule of the JSON texts that a schema (an object or a boolean) allows."""
    # A client's own options of the library could make it ignore what it cannot express.
    own = {} if schema is True else _stated_plainly(schema)
    if isinstance(own, dict):
        own = own | {"x-guidance": {"whitespace_pattern": white_space}}
    return {"json_schema": own}


def json_object() -> Rule:
    """Return the rule of any JSON object."""
    return json_schema({"type": "object"})


def regex(pattern: str) -> Rule:
    r"""Return the rule of the texts that match `pattern` as a whole. \d is an ASCII digit, as in JSON Schema."""
    terminals = [f"/{regex_to_lark(part, 'd')}/" for part in whole_patterns(pattern)]
    if len(terminals) == 1:
        return {"lark_grammar": f"start: {terminals[0]}"}
    return {"lark_grammar": f"start: TEXT\nTEXT: {' & '.join(terminals)}\n"}


def choice(options: Iterable[str]) -> Rule:
    """Return the rule of exactly these texts. One terminal for all of them: thousands of rules would be too complex."""
    texts = " | ".join(json.dumps(option, ensure_ascii=False) for option in options)
    return {"lark_grammar": f"start: OPTION\nOPTION: {texts}\n"}


def context_free(text: str) -> Rule:
    """Return the rule of a grammar in Lark's notation or in GBNF (EBNF as llama.cpp and xgrammar write it).

    Raises:
        ValueError: it is neither.
    """
    return {"lark_grammar": grammar_from("grammar", _INLINED_START.sub(r"\1start", text))}


def write(answer: Rule, thinking: bool, parts: dict[str, Rule] | None = None) -> str:
    """Return the text of `Grammar`.

    Args:
        thinking: the grammar begins after </think>.
        parts: rules that `answer` names as `@name`.
    """
    named = [{"name": ANSWER} | answer, *({"name": name} | rule for name, rule in (parts or {}).items())]
    first = [{"name": "after_thinking"} | _AFTER_THINKING] if thinking else []
    return json.dumps({"grammars": first + named}, ensure_ascii=False)


def _stated_plainly(schema: Any) -> Any:
    """Return a schema without formats that JSON Schema does not define, and with patterns that the library reads."""
    if isinstance(schema, list):
        return [_stated_plainly(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    plain = {
        keyword: value if keyword in _VALUES else _stated_plainly(value)
        for keyword, value in schema.items()
        if keyword != "format" or not isinstance(value, str) or value in _FORMATS
    }
    if isinstance(pattern := plain.get("pattern"), str):
        plain["pattern"], *others = searched_patterns(pattern)
        if others and isinstance(beside := plain.get("allOf", []), list):
            plain["allOf"] = [*beside, *({"pattern": other} for other in others)]
    return plain
