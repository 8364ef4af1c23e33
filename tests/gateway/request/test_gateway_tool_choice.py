"""Choices of tools, and the grammar of calls: what it allows is compiled and read back by the tool parser's rules."""

import json
import random
from typing import Any

import jsonschema
import pytest
from llguidance import LLMatcher
from whole_parser import WholeParser

from services.gateway.request.parsed import ParsedRequest
from shared.errors import RequestError
from shared.grammar.compiler import GrammarCompiler
from shared.model.tokenizer import Tokenizer

HI = [{"role": "user", "content": "Hi"}]
CITY = {
    "type": "object",
    "properties": {"city": {"type": "string", "minLength": 1, "maxLength": 5}, "days": {"enum": [1, 2, 3]}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": CITY}}
CLOCK = {"type": "function", "function": {"name": "clock"}}
STRICT = {"type": "function", "function": {**WEATHER["function"], "strict": True}}  # type: ignore[dict-item]
NAMED = {"type": "function", "function": {"name": "weather"}}


def allowed(mode: str, *names: str) -> dict[str, Any]:
    tools = [{"type": "function", "function": {"name": name}} for name in names]
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": tools}}


def parse(parser: WholeParser, **fields: Any) -> ParsedRequest:
    body = {"messages": HI, "tools": [WEATHER, CLOCK], "enable_thinking": False, **fields}
    return parser.parse(json.dumps(body).encode())


@pytest.fixture(scope="module")
def compiler(tokenizer: Tokenizer) -> GrammarCompiler:
    return GrammarCompiler(tokenizer, tokenizer.vocab_size, [tokenizer.control["</s>"]])


@pytest.fixture(scope="module")
def spell(tokenizer: Tokenizer) -> Any:
    """Tokens of text as the model writes it, markers as tokens."""
    return tokenizer.encode_template


def matcher(compiler: GrammarCompiler, made: ParsedRequest) -> LLMatcher:
    assert made.sampling.grammar is not None
    return compiler.compile(made.sampling.grammar.text)


def accepts(compiler: GrammarCompiler, made: ParsedRequest, tokens: list[int]) -> bool:
    """Whether the answer may be exactly these tokens."""
    state = matcher(compiler, made)
    return state.try_consume_tokens(tokens) == len(tokens) and state.is_accepting()


def call(name: str, arguments: str) -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


PARIS = call("weather", '{"city": "Paris", "days": 2}')
LYON = call("weather", '{"city": "Lyon", "days": 1}')
TIME = call("clock", "{}")

CASES: dict[str, tuple[dict[str, Any], list[str], list[str]]] = {
    "required": (
        {"tool_choice": "required"},
        # The model ends its last call with a line end, too.
        [PARIS, TIME, f"{PARIS}\n{TIME}", f"{PARIS}\n", f"{PARIS}\n{TIME}\n"],
        [
            "",
            "Hi",
            f"Hi {PARIS}",
            f"{PARIS} Hi",
            f"{PARIS}\n\n",
            f"{PARIS}\nHi",
            call("weather", "{}"),
            call("other", "{}"),
            call("clock", '{"a": 1}'),
        ],
    ),
    "required, one": ({"tool_choice": "any", "parallel_tool_calls": False}, [PARIS, TIME], [f"{PARIS}\n{TIME}"]),
    "named": ({"tool_choice": NAMED}, [PARIS], ["", "Hi", TIME, f"{PARIS}\n{LYON}"]),
    "named, the Responses API's form": (
        {"tool_choice": {"type": "function", "name": "clock"}},
        [TIME],
        [PARIS, f"{TIME}\n{TIME}"],
    ),
    "allowed, required": ({"tool_choice": allowed("required", "clock")}, [TIME, f"{TIME}\n{TIME}"], [PARIS, "Hi", ""]),
    "allowed, auto": (
        {"tool_choice": allowed("auto", "weather")},
        ["", "Hi", PARIS, f"Hi\n{PARIS}\n{LYON}", call("weather", '{"city": 5}')],
        [TIME, f"Hi\n{TIME}", call("weather", "[]")],
    ),
    "strict": (
        {"tools": [STRICT, CLOCK]},
        ["", "Hi", PARIS, f"Hi\n{PARIS}", call("clock", '{"a": 1}')],
        [call("weather", '{"city": "Paris"}'), call("other", "{}")],
    ),
    "strict, one": ({"tools": [STRICT, CLOCK], "parallel_tool_calls": False}, ["Hi", PARIS], [f"{PARIS}\n{LYON}"]),
    "or an answer with a grammar": (
        {"response_format": {"type": "json_object"}},
        ['{"a": 1}', PARIS, f"{PARIS}\n", call("clock", '{"b": 2}')],
        ["Hi", '{"a": 1}' + PARIS, ""],
    ),
    "forced in place of an answer with a grammar": (
        {"response_format": {"type": "json_object"}, "tool_choice": "required"},
        [PARIS],
        ['{"a": 1}'],
    ),
}


@pytest.mark.parametrize(("fields", "right", "wrong"), CASES.values(), ids=CASES)
def test_what_a_choice_allows(
    parser: WholeParser,
    compiler: GrammarCompiler,
    spell: Any,
    fields: dict[str, Any],
    right: list[str],
    wrong: list[str],
) -> None:
    made = parse(parser, **fields)
    assert [text for text in right if not accepts(compiler, made, spell(text))] == []
    assert [text for text in wrong if accepts(compiler, made, spell(text))] == []


def test_calls_come_after_thinking(parser: WholeParser, compiler: GrammarCompiler, spell: Any) -> None:
    made = parse(parser, tool_choice="required", enable_thinking=True)
    for text in (f"\n\n{PARIS}", PARIS):
        assert accepts(compiler, made, spell(text))
    assert not accepts(compiler, made, spell("\n\nHi"))


def test_a_spelled_marker_is_no_call(parser: WholeParser, compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    made = parse(parser, tool_choice="required")
    assert not accepts(compiler, made, tokenizer.encode_text(PARIS))


@pytest.mark.parametrize("seed", range(20))
def test_random_tokens_that_are_allowed_make_calls_that_validate(
    parser: WholeParser, compiler: GrammarCompiler, tokenizer: Tokenizer, seed: int
) -> None:
    made = parse(parser, tool_choice=NAMED)
    state = matcher(compiler, made)
    rng = random.Random(seed)
    tokens: list[int] = []
    while not state.is_stopped() and len(tokens) < 2000:
        mask = state.compute_bitmask()
        options = [i for i in range(tokenizer.vocab_size) if mask[i >> 3] >> (i & 7) & 1]
        tokens.append(rng.choice(options))
        state.consume_token(tokens[-1])
    assert state.is_stopped(), "the schema is finite"
    text = b"".join(tokenizer.token_bytes(token) for token in tokens).decode()
    body = json.loads(text.removeprefix("<tool_call>\n").removesuffix("\n</tool_call>"))
    assert body["name"] == "weather"
    jsonschema.validate(body["arguments"], CITY)


def test_free_text_has_no_grammar(parser: WholeParser) -> None:
    for fields in ({}, {"tool_choice": "auto"}, {"tool_choice": "none"}, {"tool_choice": {"type": "none"}}):
        assert parse(parser, **fields).sampling.grammar is None


def test_what_the_other_stages_are_told(parser: WholeParser) -> None:
    named = parse(parser, tool_choice=NAMED).output
    assert (named.tools, named.functions, named.named_tool) == (True, ("weather",), True)
    required = parse(parser, tool_choice="required").output
    assert (required.functions, required.named_tool) == (("weather", "clock"), False)
    assert parse(parser, tool_choice=allowed("auto", "clock")).output.functions == ("clock",)
    assert parse(parser, tool_choice=allowed("none", "clock")).output.tools is False
    assert parse(parser, tool_choice="none").output.tools is False


def test_all_tools_stand_in_the_prompt_whichever_may_be_called(parser: WholeParser) -> None:
    plain = parse(parser).segments
    for choice in ("required", NAMED, allowed("auto", "clock")):
        assert parse(parser, tool_choice=choice).segments == plain
    assert parse(parser, tool_choice="none").segments != plain


def with_parameters(**parameters: Any) -> dict[str, Any]:
    return {"tools": [{"function": {"name": "f", "parameters": parameters}}], "tool_choice": "required"}


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"tool_choice": "some"}, "tool_choice", "'some'"),
        ({"tool_choice": "function"}, "tool_choice", "'function'"),
        ({"tool_choice": "allowed_tools"}, "tool_choice", "'allowed_tools'"),
        ({"tool_choice": {}}, "tool_choice", "None"),
        ({"tool_choice": {"type": ["auto"]}}, "tool_choice", "auto"),
        ({"tool_choice": {"type": "function"}}, "tool_choice", "must name a function"),
        ({"tool_choice": {"type": "function", "function": 3}}, "tool_choice", "must name a function"),
        ({"tool_choice": {"type": "function", "function": {"name": "g"}}}, "tool_choice", "'g'"),
        ({"tool_choice": allowed("required")}, "tool_choice.allowed_tools", "a list `tools`"),
        ({"tool_choice": allowed("maybe", "clock")}, "tool_choice.allowed_tools.mode", "'maybe'"),
        ({"tool_choice": allowed("auto", "g")}, "tool_choice.allowed_tools.tools", "'g'"),
        ({"tool_choice": "required", "tools": []}, "tool_choice", "empty"),
        ({"tool_choice": "required", "tools": None}, "tool_choice", "empty"),
        (with_parameters(type="array"), "tools[0].function.parameters", "an object"),
        (with_parameters(description="x" * 60_000, enum=["y" * 90_000]), "tools[0].function.parameters", "limit"),
        (
            {"tools": [WEATHER, with_parameters(type="null", strict=True)["tools"][0]], "tool_choice": "required"},
            "tools[1].function.parameters",
            "object",
        ),
    ],
)
def test_choices_that_are_refused(parser: WholeParser, fields: dict[str, Any], param: str, message: str) -> None:
    with pytest.raises(RequestError) as refused:
        parse(parser, **fields)
    failure = refused.value.failure
    assert (failure.status, message in failure.message) == (400, True), failure
    assert (failure.param or "").startswith(param)


def test_a_schema_without_a_type_is_an_objects(parser: WholeParser, compiler: GrammarCompiler, spell: Any) -> None:
    defined = {"$ref": "#/$defs/A", "$defs": {"A": {"type": "object", "required": ["a"]}}}
    for parameters in ({"required": ["a"]}, {"type": ["object", "null"], "required": ["a"]}, defined):
        made = parse(parser, **with_parameters(**parameters))
        assert accepts(compiler, made, spell(call("f", '{"a": 1}')))
        for wrong in ("{}", "null", "[]"):
            assert not accepts(compiler, made, spell(call("f", wrong)))


@pytest.mark.parametrize(
    "tool",
    [
        {"type": "function", "name": "weather", "description": "Now", "parameters": CITY, "strict": True},
        {"name": "weather", "description": "Now", "parameters": CITY, "strict": True},
        {"name": "weather", "description": "Now", "input_schema": CITY, "strict": True},
    ],
)
def test_a_tool_in_another_apis_form_is_the_same(parser: WholeParser, tool: dict[str, Any]) -> None:
    """Cursor writes tools of the Responses API's and of Anthropic's form to the chat API."""
    function = {"name": "weather", "description": "Now", "parameters": CITY, "strict": True}
    expected = parse(parser, tools=[{"type": "function", "function": function}])
    made = parse(parser, tools=[tool])
    assert (made.segments, made.sampling.grammar) == (expected.segments, expected.sampling.grammar)
    assert made.sampling.grammar is not None


@pytest.mark.parametrize("tool", [{}, {"type": "function"}, {"type": "function", "parameters": CITY}])
def test_a_tool_without_a_name_lacks_its_function(parser: WholeParser, tool: dict[str, Any]) -> None:
    with pytest.raises(RequestError) as refused:
        parse(parser, tools=[CLOCK, tool])
    assert (refused.value.failure.param, refused.value.failure.code) == (
        "tools[1].function",
        "missing_required_parameter",
    )


@pytest.mark.parametrize(
    "choice",
    [{"type": "tool", "name": "weather"}, {"type": "function", "name": "weather"}, {"function": {"name": "weather"}}],
)
def test_a_tool_named_in_another_apis_form_is_the_same(parser: WholeParser, choice: dict[str, Any]) -> None:
    assert parse(parser, tool_choice=choice).sampling.grammar == parse(parser, tool_choice=NAMED).sampling.grammar


def test_names_of_tools_may_be_as_long_as_anthropics(parser: WholeParser) -> None:
    assert parse(parser, tools=[{"type": "function", "function": {"name": "n" * 128}}])
    with pytest.raises(RequestError):
        parse(parser, tools=[{"type": "function", "function": {"name": "n" * 129}}])


@pytest.mark.parametrize("function", [None, {"name": ""}, {"name": "weather"}])
@pytest.mark.parametrize("mode", ["auto", "none", "required"])
def test_a_type_says_what_a_choice_is(parser: WholeParser, mode: str, function: Any) -> None:
    stated = parse(parser, tool_choice={"type": mode, "function": function})
    assert stated.sampling.grammar == parse(parser, tool_choice=mode).sampling.grammar
    named = parse(parser, tool_choice={"function": {"name": "weather"}})
    assert named.sampling.grammar == parse(parser, tool_choice=NAMED).sampling.grammar
