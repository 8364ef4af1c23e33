"""Structured output: the one grammar that a request asks for, from any of the fields in which APIs have it.

    OpenAI      response_format: json_object, json_schema (enforced, strict or not)
    vLLM        structured_outputs, response_format: structural_tag
    older       guided_json, guided_json_object, guided_regex, guided_choice, guided_grammar, structural_tag
    SGLang      json_schema, regex, ebnf; llama.cpp: grammar
    tools       tool_choice, and tools that are strict: the grammar of calls (`tool_choice.py`)

A call may take the place of an answer with a grammar where tools are offered, and must where `tool_choice` forces one.

The grammar is only written here; `services/gateway/grammars/check.py` has it tried.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import msgspec

from services.gateway.request.conversation import Tool
from services.gateway.request.schemas import (
    ChatRequest,
    JsonObjectFormat,
    JsonSchemaFormat,
    ResponseFormat,
    StructuralTagFormat,
    StructuredOutputs,
)
from services.gateway.request.tool_choice import (
    arguments_schema,
    call_format,
    object_schema,
    optional_calls,
    read_tool_choice,
)
from services.gateway.request.validate import check_depth
from shared.errors import invalid
from shared.grammar import forms, structural_tag
from shared.grammar.forms import WHITE_SPACE, Rule
from shared.grammar.structural_tag import Format
from shared.message_fields import OPTIONAL_CALLS
from shared.messages import Grammar

MAX_GRAMMAR_BYTES = 128 << 10
MAX_DEPTH = 64  # of JSON; a schema has two or three levels for each of what it describes

# Fields of a request, and of `structured_outputs`, by the form of grammar that each states.
_FIELDS = {
    "guided_json": "json",
    "guided_json_object": "json_object",
    "guided_regex": "regex",
    "guided_choice": "choice",
    "guided_grammar": "grammar",
    "structural_tag": "structural_tag",
    "json_schema": "json",
    "regex": "regex",
    "ebnf": "grammar",
    "grammar": "grammar",
}
_FORMS = ("json", "json_object", "regex", "choice", "grammar", "structural_tag")


class _Asked(NamedTuple):
    param: str
    form: str  # one of _FORMS
    value: Any
    white_space: str = WHITE_SPACE


def requested_grammar(request: ChatRequest, control: Mapping[str, int], thinking: bool) -> Grammar | None:
    """Return the grammar that a request asks for; None if it asks for none.

    Args:
        control: control tokens, by their text.
        thinking: the answer begins with reasoning, to which the grammar does not apply.

    Raises:
        RequestError: 400 naming the field: there are two, or it is malformed or too large.
    """
    choice = read_tool_choice(request)
    parallel = request.parallel_tool_calls is not False
    asked = [*_of_response_format(request.response_format), *_of_fields(request)]
    if request.structured_outputs is not None:
        asked += _of_structured_outputs(request.structured_outputs)
    asked = _distinct(asked)
    if len(asked) > 1:
        first, second = (one.param for one in asked[:2])
        raise invalid(f"Only one of `{first}` and `{second}` may be given.", second)
    if choice.mode == "required" or not asked:
        form, param = call_format(choice, parallel), OPTIONAL_CALLS if choice.as_offered else "tool_choice"
        return None if form is None else _checked(param, lambda: structural_tag.write(form, control, thinking))
    [only] = asked
    calls = optional_calls(choice, parallel)
    return _checked(only.param, lambda: _write(only, control, thinking, calls))


def tool_grammars(request: ChatRequest) -> tuple[Grammar, ...]:
    """Return the grammar of each tool's arguments, where they are enforced: it tells which tool is at fault.

    Raises:
        RequestError: 400 naming the tool: its parameters are malformed or too large.
    """
    choice = read_tool_choice(request)
    offered = request.tools or []

    def one(tool: Tool) -> Grammar:
        path = f"tools[{offered.index(tool)}].function.parameters"
        return _checked(path, lambda: forms.write(forms.json_schema(arguments_schema(tool)), thinking=False))

    return tuple(one(tool) for tool in choice.tools if choice.mode == "required" or tool.function.strict)


def _checked(param: str, write: Callable[[], str]) -> Grammar:
    """Return the grammar that `write` returns the text of.

    Raises:
        RequestError: 400 naming `param`: it is malformed or too large.
    """
    try:
        text = write()
    except (ValueError, msgspec.ValidationError, RecursionError) as error:
        raise invalid(f"`{param}`: {error}.", param) from None
    size = len(text.encode("utf-8", "surrogatepass"))
    if size > MAX_GRAMMAR_BYTES:
        raise invalid(f"`{param}` has {size} bytes as a grammar; the limit is {MAX_GRAMMAR_BYTES}.", param)
    return Grammar(text, param)


def _distinct(asked: Sequence[_Asked]) -> list[_Asked]:
    """Return what is asked for, each once: guidance states one grammar in the fields of older and newer servers."""
    statements = [one._replace(param="") for one in asked]
    return [one for place, one in enumerate(asked) if statements[place] not in statements[:place]]


def _of_response_format(response_format: ResponseFormat | None) -> Iterator[_Asked]:
    param = "response_format"
    match response_format:
        case JsonObjectFormat(schema):
            stated = _object_schema(schema, f"{param}.schema") if schema else None
            yield _Asked(param, "json_object", True) if stated is None else _Asked(param, "json", stated)
        case JsonSchemaFormat(json_schema):
            yield _Asked(param, "json", json_schema.schema)
        case StructuralTagFormat():
            fields = msgspec.structs.asdict(response_format)
            yield _Asked(param, "structural_tag", {name: value for name, value in fields.items() if value is not None})


def _object_schema(schema: dict[str, Any], param: str) -> dict[str, Any]:
    try:
        return object_schema(schema, "what it describes")
    except ValueError as error:
        raise invalid(f"`{param}`: {error}.", param) from None


def _of_fields(request: ChatRequest) -> Iterator[_Asked]:
    for field, form in _FIELDS.items():
        value = getattr(request, field)
        if value is not None and value is not False:
            yield _Asked(field, form, value)


def _of_structured_outputs(given: StructuredOutputs) -> Iterator[_Asked]:
    if given.disable_additional_properties:
        field = "structured_outputs.disable_additional_properties"
        raise invalid(f"`{field}` is not supported; set additionalProperties in the schema.", field)
    white_space = WHITE_SPACE if given.whitespace_pattern is None else given.whitespace_pattern
    for form in _FORMS:
        value = getattr(given, form)
        if value is not None and value is not False:
            yield _Asked(f"structured_outputs.{form}", form, value, "" if given.disable_any_whitespace else white_space)


def _write(asked: _Asked, control: Mapping[str, int], thinking: bool, calls: Format | None) -> str:
    """Return the grammar's text, by which `calls` may come instead. A structural tag says by itself what may.

    Raises:
        ValueError: it is malformed.
    """
    if asked.form == "structural_tag":
        return structural_tag.write(structural_tag.read(_read_json(asked.value, asked.param)), control, thinking)
    rule = _rule(asked)
    return forms.write(rule, thinking) if calls is None else structural_tag.write(calls, control, thinking, rule)


def _rule(asked: _Asked) -> Rule:
    value = asked.value
    match asked.form:
        case "json":
            return forms.json_schema(_read_json(value, asked.param), asked.white_space)
        case "json_object":
            return forms.json_schema({"type": "object"}, asked.white_space)
        case "choice":
            return forms.choice(value)
    _check_size(value)
    return forms.regex(value) if asked.form == "regex" else forms.context_free(value)


def _read_json(value: Any, param: str) -> Any:
    """Return a JSON object or boolean that may have been given as text.

    Raises:
        ValueError: it is something else.
        RequestError: 400, it is nested too deeply.
    """
    if isinstance(value, str):
        _check_size(value)
        value = msgspec.json.decode(value)
    if not isinstance(value, dict | bool):
        raise ValueError(f"must be a JSON object, not {type(value).__name__}")
    check_depth(value, param, MAX_DEPTH)
    return value


def _check_size(text: str) -> None:
    if len(text) > MAX_GRAMMAR_BYTES:
        raise ValueError(f"has {len(text)} characters; the limit is {MAX_GRAMMAR_BYTES}")
