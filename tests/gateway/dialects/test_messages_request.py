"""Bodies of the Messages API: each asks for the same as a chat request does, or is refused by the name of its field."""

import base64
import json
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace
from whole_parser import WholeParser

from services.gateway.dialects.messages.dialect import MessagesDialect, read_count
from services.gateway.dialects.messages.schemas import NEUTRAL_VALUES, NO_EFFECT, CountRequest, MessagesRequest
from services.gateway.request.parsed import ParsedRequest
from shared.errors import Failure, RequestError

MESSAGES = MessagesDialect()
HI = [{"role": "user", "content": "Hi"}]
PIXELS = base64.b64encode(b"pixels").decode()
PNG = {"type": "base64", "media_type": "image/png", "data": PIXELS}
IMAGE = {"type": "image", "source": PNG}
IMAGE_PART = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PIXELS}"}}
LINK = "https://example.org/a.mp4"
EPHEMERAL = {"type": "ephemeral", "ttl": "1h"}
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOL = {"name": "get_weather", "description": "Weather", "input_schema": SCHEMA}
STRICT = {**TOOL, "name": "g", "strict": True}
FUNCTION = {"name": "get_weather", "description": "Weather", "parameters": SCHEMA}
TOOLS = [{"type": "function", "function": FUNCTION}]


def text(words: str, **fields: Any) -> dict[str, Any]:
    return {"type": "text", "text": words, **fields}


def said(role: str, *content: Any) -> dict[str, Any]:
    return {"role": role, "content": list(content)}


def use(call: str = "toolu_1", **arguments: Any) -> dict[str, Any]:
    return {"type": "tool_use", "id": call, "name": "get_weather", "input": arguments}


def result(content: Any = "Sunny.", call: str = "toolu_1", **fields: Any) -> dict[str, Any]:
    return {"type": "tool_result", "tool_use_id": call, "content": content, **fields}


def deep(levels: int) -> Any:
    return {"items": deep(levels - 1)} if levels else {}


def called(call: str = "toolu_1", **arguments: Any) -> dict[str, Any]:
    return {"id": call, "type": "function", "function": {"name": "get_weather", "arguments": json.dumps(arguments)}}


# A body of the Messages API beside the chat request that it stands for.
SAME: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "text": ({}, {}),
    "sampling": (
        {"temperature": 0.5, "top_p": 0.25, "top_k": 7, "stop_sequences": ["END", ""], "stream": True},
        {"temperature": 0.5, "top_p": 0.25, "top_k": 7, "stop": ["END"], "stream": True},
    ),
    "no effect": (
        {
            "metadata": {"user_id": "u"},
            "service_tier": "auto",
            "cache_control": EPHEMERAL,
            "mcp_servers": [],
            "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
        },
        {},
    ),
    "system": ({"system": "Be brief."}, {"messages": [{"role": "system", "content": "Be brief."}, *HI]}),
    "blocks of the system": (
        {"system": [text("Be brief.", cache_control=EPHEMERAL), text("Be kind.")]},
        {"messages": [{"role": "system", "content": "Be brief.\nBe kind."}, *HI]},
    ),
    "a system turn": (
        {"messages": [*HI, {"role": "system", "content": [text("Now in French.")]}]},
        {"messages": [*HI, {"role": "system", "content": "Now in French."}]},
    ),
    "blocks of text": (
        {"messages": [said("user", text("<note>Rain</note>", cache_control=EPHEMERAL), text("Hi"))]},
        {"messages": [{"role": "user", "content": "<note>Rain</note>\nHi"}]},
    ),
    "turns in a row": (
        {"messages": [*HI, said("user", text("there"), IMAGE), {"role": "user", "content": "Look."}]},
        {"messages": [{"role": "user", "content": [text("Hi\nthere"), IMAGE_PART, text("Look.")]}]},
    ),
    "a picture by its link": (
        {"messages": [said("user", {"type": "image", "source": {"type": "url", "url": LINK}}, text("?"))]},
        {"messages": [said("user", {"type": "image_url", "image_url": LINK}, text("?"))]},
    ),
    "a video": (
        {"messages": [said("user", {"type": "video", "source": {"type": "url", "url": LINK}}, text("?"))]},
        {"messages": [said("user", {"type": "video_url", "video_url": LINK}, text("?"))]},
    ),
    "documents": (
        {
            "messages": [
                said(
                    "user",
                    {
                        "type": "document",
                        "title": "Notes",
                        "source": {"type": "text", "media_type": "text/plain", "data": "It rains."},
                    },
                    {"type": "document", "source": {"type": "content", "content": [text("A"), text("B")]}},
                    {"type": "search_result", "source": "a.org", "title": "T", "content": [text("found")]},
                )
            ]
        },
        {"messages": [{"role": "user", "content": "Notes\nIt rains.\nA\nB\nT\na.org\nfound"}]},
    ),
    "an answer before": (
        {
            "messages": [
                *HI,
                said(
                    "assistant",
                    {"type": "thinking", "thinking": "A greeting.", "signature": "of another server"},
                    {"type": "redacted_thinking", "data": "b3BhcXVl"},
                    text("Hello"),
                    text("."),
                ),
                *HI,
            ]
        },
        {
            "messages": [
                *HI,
                {"role": "assistant", "content": "Hello.", "reasoning_content": "A greeting."},
                *HI,
            ]
        },
    ),
    "calls and their results": (
        {
            "tools": [{**TOOL, "cache_control": EPHEMERAL}],
            "messages": [
                *HI,
                said(
                    "assistant",
                    {"type": "thinking", "thinking": "Two cities.", "signature": "s"},
                    text("I look."),
                    use("toolu_1", city="Paris"),
                    use("toolu_2", city="Rome"),
                ),
                said(
                    "user",
                    result("Sunny.", "toolu_1"),
                    result([text("A"), IMAGE], "toolu_2", is_error=True),
                    text("Well?"),
                ),
            ],
        },
        {
            "tools": TOOLS,
            "messages": [
                *HI,
                {
                    "role": "assistant",
                    "content": "I look.",
                    "reasoning_content": "Two cities.",
                    "tool_calls": [called("toolu_1", city="Paris"), called("toolu_2", city="Rome")],
                },
                {"role": "tool", "tool_call_id": "toolu_1", "content": "Sunny."},
                {"role": "tool", "tool_call_id": "toolu_2", "content": [text("Error:\nA"), IMAGE_PART]},
                {"role": "user", "content": "Well?"},
            ],
        },
    ),
    "an empty result": (
        {"messages": [*HI, said("assistant", use()), said("user", {"type": "tool_result", "tool_use_id": "toolu_1"})]},
        {
            "messages": [
                *HI,
                {"role": "assistant", "content": "", "tool_calls": [called()]},
                {"role": "tool", "tool_call_id": "toolu_1", "content": ""},
            ]
        },
    ),
    "a beginning of the answer": (
        {"messages": [*HI, {"role": "assistant", "content": "Well, "}]},
        {"messages": [*HI, {"role": "assistant", "content": "Well, "}], "continue_final_message": True},
    ),
    "any tool": (
        {"tools": [TOOL], "tool_choice": {"type": "any", "disable_parallel_tool_use": True}},
        {"tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": False},
    ),
    "one tool": (
        {"tools": [TOOL], "tool_choice": {"type": "tool", "name": "get_weather"}},
        {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "get_weather"}}},
    ),
    "no tool": ({"tools": [TOOL], "tool_choice": {"type": "none"}}, {"tools": TOOLS, "tool_choice": "none"}),
    "a strict tool with examples": (
        {"tools": [{**TOOL, "type": "custom", "strict": True, "input_examples": [{"city": "Rome"}]}]},
        {
            "tools": [
                {
                    "type": "function",
                    "function": {
                        **FUNCTION,
                        "strict": True,
                        "parameters": {**SCHEMA, "examples": [{"city": "Rome"}]},
                    },
                }
            ]
        },
    ),
    "thinking": (
        {"thinking": {"type": "enabled", "budget_tokens": 1024}},
        {"thinking": {"type": "enabled", "budget_tokens": 1024}},
    ),
    "adaptive thinking": ({"thinking": {"type": "adaptive"}, "output_config": {"effort": "low"}}, {}),
    "no thinking": (
        {"thinking": {"type": "disabled"}, "output_config": {"effort": "max"}},
        {"enable_thinking": False},
    ),
    "thinking that is not shown": (
        {"thinking": {"type": "adaptive", "display": "omitted"}},
        {"include_reasoning": False},
    ),
    "a schema": (
        {"output_config": {"format": {"type": "json_schema", "schema": SCHEMA}}},
        {"response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA}}},
    ),
    "a schema under its older name": (
        {"output_format": {"type": "json_schema", "schema": SCHEMA}},
        {"response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA}}},
    ),
}


def meaning(parsed: ParsedRequest) -> ParsedRequest:
    """A parsed request without what may differ: the seed that was drawn, names of fields, and this API's own facts."""
    grammar = parsed.sampling.grammar
    return replace(
        parsed,
        dialect="",
        kept=b"",
        sampling=replace(parsed.sampling, seed=0, grammar=grammar and replace(grammar, param="")),
        output=replace(parsed.output, first_usage=False),
        tool_grammars=tuple(replace(one, param="") for one in parsed.tool_grammars),
        media=tuple(replace(one, part="", field="", own_param="") for one in parsed.media),
    )


@pytest.mark.parametrize(("body", "chat"), SAME.values(), ids=SAME)
def test_a_body_asks_for_what_a_chat_request_asks_for(
    parser: WholeParser, body: dict[str, Any], chat: dict[str, Any]
) -> None:
    base = {"messages": HI, "max_tokens": 300}
    parsed = parser.parse(json.dumps({**base, **body}).encode(), MESSAGES)
    assert meaning(parsed) == meaning(parser.parse(json.dumps({**base, **chat}).encode()))
    assert (parsed.dialect, parsed.warnings) == ("messages", ())
    assert parsed.output.first_usage


def test_the_table_has_every_field() -> None:
    tried = {field for body, _ in SAME.values() for field in body}
    assert set(MessagesRequest.__struct_fields__) - tried == {"model", "max_tokens"}
    assert set(CountRequest.__struct_fields__) < set(MessagesRequest.__struct_fields__)


def test_the_page_names_every_field() -> None:
    page = (Path(__file__).parents[3] / "docs" / "messages.md").read_text()
    known = {*MessagesRequest.__struct_fields__, *NEUTRAL_VALUES, *NO_EFFECT}
    assert [field for field in sorted(known) if f"`{field}`" not in page] == []


BAD: list[tuple[dict[str, Any], str | None, str]] = [
    ({"max_tokens": None}, "max_tokens", "int"),
    ({"max_tokens": 0}, "max_tokens", ">= 1"),
    ({"max_tokens": -1}, "max_tokens", ">= 1"),
    ({"messages": []}, "messages", ">= 1"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role", "tool"),
    ({"messages": [said("user", {"type": "server_tool_use"})]}, "messages[0].content[0].type", "server_tool_use"),
    ({"messages": [said("user", text("x"), use())]}, "messages[0].content[1].type", "user"),
    ({"messages": [*HI, said("assistant", IMAGE)]}, "messages[1].content[0].type", "assistant"),
    ({"messages": [*HI, said("system", IMAGE)]}, "messages[1].content[0].type", "system"),
    ({"messages": [*HI, said("assistant", text("x"), use())]}, "messages[1]", "tool_result"),
    (
        {"messages": [said("user", {"type": "document", "source": {**PNG, "media_type": "application/pdf"}})]},
        "messages[0].content[0].source",
        "not text",
    ),
    (
        {
            "messages": [
                said(
                    "user",
                    {
                        "type": "document",
                        "source": {"type": "text", "data": "x"},
                        "citations": {"enabled": True},
                    },
                )
            ]
        },
        "messages[0].content[0].citations",
        "cited",
    ),
    (
        {"messages": [said("user", text("x"), {"type": "image", "source": {**PNG, "data": "!"}})]},
        "messages[0].content[1].source",
        "base64",
    ),
    (
        {"messages": [said("user", {"type": "image", "source": {"type": "file", "file_id": "f"}})]},
        "messages[0].content[0].source.type",
        "file",
    ),
    (
        {"messages": [said("user", {"type": "image", "source": {"type": "url", "url": "ftp://a"}})]},
        "messages[0].content[0].source",
        "http",
    ),
    (
        {
            "system": "moves the others",
            "messages": [*HI, said("assistant", use()), said("user", result([text("x"), IMAGE, IMAGE, IMAGE]))],
        },
        "messages[2].content[0].content[3].source",
        "limit is 2",
    ),
    ({"tools": [{"type": "bash_20250124", "name": "bash"}]}, "tools[0].type", "bash_20250124"),
    ({"tools": [TOOL, {"name": "f"}]}, "tools[1].input_schema", "Missing"),
    ({"tools": [{**TOOL, "defer_loading": True}]}, "tools[0].defer_loading", "supported"),
    ({"tools": [{**TOOL, "allowed_callers": ["code"]}]}, "tools[0].allowed_callers", "supported"),
    (
        {"tools": [TOOL, {**TOOL, "name": "g", "strict": True, "input_schema": {"type": "array"}}]},
        "tools[1].input_schema",
        "object",
    ),
    ({"tools": [TOOL], "tool_choice": {"type": "tool"}}, "tool_choice.name", "name"),
    ({"tools": [TOOL], "tool_choice": {"type": "tool", "name": "g"}}, "tool_choice", "'g'"),
    ({"tool_choice": {"type": "any"}}, "tool_choice", "empty"),
    ({"thinking": {"type": "between_tools"}}, "thinking.type", "between_tools"),
    ({"thinking": {"type": "enabled", "budget_tokens": 0}}, "thinking.budget_tokens", ">= 1"),
    ({"stop_sequences": ["x" * 257]}, "stop_sequences[0]", "256"),
    ({"output_config": {"effort": "huge"}}, "output_config.effort", "huge"),
    ({"output_config": {"format": {"type": "json_schema", "schema": deep(70)}}}, "output_config.format", "nested"),
    ({"output_format": {"type": "json_schema", "schema": deep(70)}}, "output_format", "nested"),
    ({"mcp_servers": [{"name": "x"}]}, "mcp_servers", "supported"),
    ({"container": "c"}, "container", "supported"),
    ({"speed": "fast"}, "speed", "supported"),
    (
        {"context_management": {"edits": [{"type": "clear_tool_uses_20250919"}]}},
        "context_management.edits[0]",
        "supported",
    ),
    ({"context_management": {"edits": 3}}, "context_management.edits", "array"),
    ({"context_management": 3}, "context_management", "object"),
    ({"messages": [{"role": "user", "content": "long " * 3000}]}, "messages", "context length"),
]


def refusal(parser: WholeParser, body: dict[str, Any]) -> Failure:
    with pytest.raises(RequestError) as refused:
        parser.parse(json.dumps(body).encode(), MESSAGES)
    return refused.value.failure


@pytest.mark.parametrize(("fields", "param", "words"), BAD, ids=[str(param) for _, param, _ in BAD])
def test_what_is_wrong_is_named_as_the_body_names_it(
    parser: WholeParser, fields: dict[str, Any], param: str, words: str
) -> None:
    failure = refusal(parser, {"messages": HI, "max_tokens": 300, **fields})
    assert (failure.status, failure.param) == (400, param)
    assert words in failure.message
    assert f"`{param}" in failure.message


def test_a_body_without_max_tokens_is_refused(parser: WholeParser) -> None:
    assert refusal(parser, {"messages": HI}).param == "max_tokens"


def test_what_the_encoder_says_of_a_picture_names_its_block(parser: WholeParser) -> None:
    body = {"max_tokens": 3, "system": "s", "messages": [*HI, said("user", text("a"), IMAGE, text("b"), IMAGE)]}
    parsed = parser.parse(json.dumps(body).encode(), MESSAGES)
    assert [item.param for item in parsed.media] == ["messages[1].content[1].source", "messages[1].content[3].source"]


def test_an_unknown_field_is_warned_of(parser: WholeParser) -> None:
    parsed = parser.parse(json.dumps({"messages": HI, "max_tokens": 3, "maxtokens": 5}).encode(), MESSAGES)
    assert "`maxtokens`" in parsed.warnings[0]


def test_a_prompt_is_counted_as_it_is_asked(parser: WholeParser) -> None:
    body = {"system": "s", "messages": HI, "tools": [TOOL], "thinking": {"type": "disabled"}}
    asked = parser.parse(json.dumps({**body, "max_tokens": 3}).encode(), MESSAGES)
    counted = parser.parse(json.dumps(body).encode(), Counted())
    assert counted.segments == asked.segments


class Counted(MessagesDialect, frozen=True):
    def read(self, body: bytes) -> Any:
        return read_count(body)
