"""Bodies of the Responses API as chat requests: what each field becomes, and the name by which it is refused."""

from typing import Any

import msgspec
import pytest
from openai.types.responses.response_item_list import ResponseItemList
from system import data_url, encoded, picture
from whole_parser import WholeParser

from services.gateway.dialects.responses.items import listed_item
from services.gateway.dialects.responses.responses import ResponsesDialect
from services.gateway.request.conversation import Message
from services.gateway.request.parsed import ParsedRequest
from services.gateway.request.statement import Statement
from shared.errors import RequestError
from shared.model.generation import GenerationDefaults

DIALECT = ResponsesDialect(GenerationDefaults(0.8, 0.7, 5, 1.1, 0.2, 0.3, 0.05), 100.0, 1 << 20)
IMAGE = data_url(encoded(picture(4, 4), "PNG"), "image/png")
TOOL: dict[str, Any] = {"type": "function", "name": "f", "parameters": {"type": "object"}}
TOOLS = [TOOL]
SPACE: dict[str, Any] = {"type": "namespace", "name": "agents", "description": "Helpers.", "tools": [TOOL]}


def stated(body: dict[str, Any], history: list[dict[str, Any]] | None = None) -> Statement:
    dialect = msgspec.structs.replace(DIALECT, history=history or [])
    return dialect.read(msgspec.json.encode({"input": "Hi", **body}))


def parsed(parser: WholeParser, body: dict[str, Any]) -> ParsedRequest:
    return parser.parse(msgspec.json.encode({"input": "Hi", **body}), DIALECT)


def said(message: Message) -> Any:
    """A message as what it has."""
    fields = msgspec.to_builtins(message)
    return {name: value for name, value in fields.items() if value is not None}


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"input": []}, "input"),
    ({"tools": [{**SPACE, "name": "agents\n"}]}, "tools[0].name"),
    (
        {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
        "input[0].content[0].image_url",
    ),
    (
        {"input": [{"role": "user", "content": [{"type": "input_image", "file_id": "f"}]}]},
        "input[0].content[0].file_id",
    ),
    (
        {"input": [{"role": "user", "content": [{"type": "input_file", "file_data": "x"}]}]},
        "input[0].content[0].file_data",
    ),
    ({"input": [{"role": "user"}]}, "input[0].content"),
    ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type"),
    ({"input": [{"type": "web_search_call", "id": "x"}]}, "input[0].type"),
    (
        {"input": [{"role": "system", "content": [{"type": "input_image", "image_url": IMAGE}]}]},
        "input[0].content[0].type",
    ),
    ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
    ({"tools": [{"type": "mcp", "server_label": "x"}]}, "tools[0].type"),
    ({"tools": [{"type": "function", "name": "no name"}]}, "tools[0].name"),
    ({"tools": [TOOL, {**SPACE, "tools": [TOOL, {"type": "custom", "name": "x"}]}]}, "tools[1].tools[1].type"),
    ({"tools": [SPACE, {**TOOL, "name": "agents.f"}]}, "tools[1].name"),
    ({"tools": [{**SPACE, "name": "a.b"}]}, "tools[0].name"),
    ({"tools": [SPACE], "tool_choice": {"type": "function", "name": "f"}}, "tool_choice"),
    ({"tools": TOOLS, "tool_choice": {"type": "file_search"}}, "tool_choice.type"),
    ({"tools": TOOLS, "tool_choice": {"type": "function", "name": "g"}}, "tool_choice"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"text": {"format": {"type": "json_schema", "schema": {}}}}, "text.format.name"),
    ({"text": {"verbosity": "low"}}, "text.verbosity"),
    ({"text": {"verbosity": "short"}}, "text.verbosity"),
    ({"truncation": "auto"}, "truncation"),
    ({"truncation": "middle"}, "truncation"),
    ({"reasoning": {"summary": "long"}}, "reasoning.summary"),
    ({"max_tool_calls": 3}, "max_tool_calls"),
    ({"conversation": "conv_1"}, "conversation"),
    ({"prompt": {"id": "p"}}, "prompt"),
    ({"include": ["file_search_call.results"]}, "include[0]"),
    ({"top_logprobs": 3}, "top_logprobs"),
    ({"reasoning": {"effort": "some"}}, "reasoning.effort"),
    ({"reasoning": {"mode": "pro"}}, "reasoning.mode"),
    ({"reasoning": {"context": "all_turns"}}, "reasoning.context"),
    ({"tools": [{**TOOL, "allowed_callers": ["programmatic"]}]}, "tools[0].allowed_callers"),
    ({"background": True, "store": False}, "background"),
    ({"metadata": {"a": 1}}, "metadata[...]"),
    ({"max_output_tokens": 0}, "max_output_tokens"),
    ({"max_output_tokens": -1}, "max_output_tokens"),
    ({"input": "word " * 5000}, "input"),
]


@pytest.mark.parametrize(("body", "param"), REFUSED, ids=[param for _, param in REFUSED])
def test_what_is_not_supported_is_refused_by_its_name(parser: WholeParser, body: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError) as refused:
        parsed(parser, body)
    assert refused.value.failure.param == param
    assert f"`{param}`" in refused.value.failure.message


@pytest.mark.parametrize(
    ("body", "unsupported"),
    [
        ({"text": {"verbosity": "high"}}, True),
        ({"text": {"verbosity": "short"}}, False),
        ({"truncation": "auto"}, True),
        ({"truncation": "middle"}, False),
    ],
)
def test_what_openai_has_and_we_have_not_is_told_from_what_nobody_has(
    parser: WholeParser, body: dict[str, Any], unsupported: bool
) -> None:
    with pytest.raises(RequestError) as refused:
        parsed(parser, body)
    assert (refused.value.failure.code == "unsupported_parameter") == unsupported


def test_what_a_turn_of_the_model_left_is_one_message() -> None:
    items = [
        {"role": "developer", "content": "D"},
        {"role": "user", "content": "Hi"},
        {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
        {
            "type": "message",
            "role": "assistant",
            "content": [{"type": "output_text", "text": "Hello", "annotations": []}],
        },
        {"type": "function_call", "name": "f", "call_id": "a", "arguments": "{}"},
        {"type": "function_call", "name": "g", "call_id": "b", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "a", "output": "1"},
        {"type": "function_call_output", "call_id": "b", "output": [{"type": "input_text", "text": "2"}]},
        {"type": "reasoning", "summary": [{"type": "summary_text", "text": "so"}]},
        {"role": "assistant", "content": "Done"},
        {"role": "assistant", "content": "Really"},
    ]
    messages = [said(message) for message in stated({"input": items, "instructions": "I"}).request.messages]
    calls = [
        {"function": {"name": name, "arguments": "{}"}, "custom": None, "id": call, "type": "function"}
        for name, call in (("f", "a"), ("g", "b"))
    ]
    assert messages == [
        {"role": "system", "content": "I"},
        {"role": "developer", "content": "D"},
        {"role": "user", "content": "Hi"},
        {
            "role": "assistant",
            "reasoning_content": "hm",
            "content": [{"type": "text", "text": "Hello"}],
            "tool_calls": calls,
        },
        {"role": "tool", "content": "1", "tool_call_id": "a"},
        {"role": "tool", "content": [{"type": "text", "text": "2"}], "tool_call_id": "b"},
        {"role": "assistant", "reasoning_content": "so", "content": "Done"},
        {"role": "assistant", "content": "Really"},
    ]


def test_fields_become_those_of_a_chat(parser: WholeParser) -> None:
    body = {
        "temperature": 0.5,
        "top_p": 0.25,
        "max_output_tokens": 7,
        "top_k": 3,
        "stop": ["."],
        "include": ["message.output_text.logprobs", "reasoning.encrypted_content"],
        "top_logprobs": 2,
        "reasoning": {"effort": "none", "summary": "auto"},
        "tools": [TOOL, {**TOOL, "name": "g"}],
        "tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "g"}]},
        "parallel_tool_calls": False,
        "service_tier": "flex",
        "user": "me",
    }
    request = parsed(parser, body)
    sampling, output = request.sampling, request.output
    assert (sampling.temperature, sampling.top_p, sampling.max_tokens, sampling.top_k) == (0.5, 0.25, 7, 3)
    assert (sampling.logprobs, output.logprobs, output.stop) == (2, True, (".",))
    assert (output.thinking, output.functions, output.parallel_tool_calls) == (False, ("g",), False)
    assert (request.keep_s, request.outlives, request.warnings) == (100.0, False, ())
    assert parsed(parser, {"store": False}).keep_s == 0
    assert parsed(parser, {"background": True}).outlives
    assert "`colour`" in parsed(parser, {"colour": "red"}).warnings[0]


@pytest.mark.parametrize(
    ("reasoning", "shown"),
    [
        ({"summary": "auto"}, "auto"),
        ({"summary": "detailed", "generate_summary": "auto"}, "detailed"),
        ({"generate_summary": "concise"}, "concise"),
        ({"summary": "none"}, None),
        ({"summary": None}, None),
        (None, None),
    ],
)
def test_an_answer_says_which_summary_was_asked_for(reasoning: Any, shown: str | None) -> None:
    assert msgspec.json.decode(stated({"reasoning": reasoning}).kept)["reasoning"]["summary"] == shown


def test_a_function_of_a_namespace_is_known_to_the_model_by_both_names(parser: WholeParser) -> None:
    call = {"type": "function_call", "namespace": "agents", "name": "f", "call_id": "a", "arguments": "{}"}
    output = {"type": "function_call_output", "call_id": "a", "output": "1"}
    body = {"tools": [TOOL, SPACE], "input": [{"role": "user", "content": "Hi"}, call, output]}
    request = stated(body).request
    assert [(tool.function.name, tool.function.description) for tool in request.tools or ()] == [
        ("f", None),
        ("agents.f", "Helpers."),
    ]
    (past,) = request.messages[1].tool_calls or ()
    assert past.function is not None
    assert past.function.name == "agents.f"
    chosen = {"type": "function", "namespace": "agents", "name": "f"}
    assert parsed(parser, {**body, "tool_choice": chosen}).output.functions == ("agents.f",)
    allowed = {"type": "allowed_tools", "mode": "auto", "tools": [chosen]}
    assert parsed(parser, {**body, "tool_choice": allowed}).output.functions == ("agents.f",)


@pytest.mark.parametrize(
    ("form", "schema"),
    [
        ({"type": "json_object"}, '"object"'),
        ({"type": "json_schema", "name": "a", "schema": {"const": "x7"}, "strict": True}, '"x7"'),
    ],
)
def test_a_form_of_text_is_a_grammar_under_its_own_name(parser: WholeParser, form: dict[str, Any], schema: str) -> None:
    grammar = parsed(parser, {"text": {"format": form}}).sampling.grammar
    assert grammar is not None
    assert (grammar.param, schema in grammar.text) == ("text.format", True)


def test_media_are_named_where_they_stand(parser: WholeParser) -> None:
    content = [
        {"type": "input_text", "text": "Look"},
        {"type": "input_image", "image_url": IMAGE, "detail": "auto"},
        {"type": "input_file", "filename": "a.png", "file_data": IMAGE},
    ]
    items = [{"type": "reasoning", "summary": []}, {"role": "user", "content": content}]
    request = parsed(parser, {"input": items, "instructions": "I"})
    assert [item.param for item in request.media] == ["input[1].content[1].image_url", "input[1].content[2].file_data"]
    video = {"type": "input_video", "video_url": {"url": "https://a.b/c.mp4", "fps": 2}}
    file = {"type": "input_file", "file_url": "https://a.b/c.png?d=e", "filename": "c.png"}
    output = {"type": "function_call_output", "call_id": "a", "output": [video, file]}
    first, second = parsed(parser, {"input": [output]}).media
    assert (first.param, first.video.fps) == ("input[0].output[0].video_url", 2)
    assert (second.param, second.kind) == ("input[0].output[1].file_url", "image")


def test_what_stands_beside_a_link_works_or_is_refused_by_name(parser: WholeParser) -> None:
    link = "https://a.b/c.mp4"
    parts = [
        {"type": "input_image", "image_url": IMAGE, "max_pixels": 9000},
        {"type": "input_video", "video_url": link, "fps": 2, "max_pixels": 9000},
        {"type": "input_video", "video_url": {"url": link, "fps": 2}, "fps": 3, "max_pixels": 9000},
        {"type": "input_file", "file_url": link, "fps": 2, "max_pixels": 9000},
        {"type": "input_file", "file_data": IMAGE, "max_pixels": 9000},
    ]
    for part, fps in zip(parts, (None, 2, 2, 2, None), strict=True):
        [item] = parsed(parser, {"input": [{"role": "user", "content": [part]}]}).media
        assert (item.max_pixels, item.video.fps) == (9000, fps)
        refused = {**part, "resized_height": 7}
        with pytest.raises(RequestError) as error:
            parsed(parser, {"input": [{"role": "user", "content": [refused]}]})
        assert error.value.failure.param == "input[0].content[0].resized_height"
        assert error.value.failure.code == "unsupported_parameter"


def test_items_are_listed_as_openai_lists_them() -> None:
    items = [
        {"role": "user", "content": "Hi"},
        {"role": "user", "content": [{"type": "input_image", "image_url": IMAGE}]},
        {"role": "assistant", "content": "Hello"},
        {"type": "reasoning", "content": [{"type": "reasoning_text", "text": "hm"}]},
        {"type": "function_call", "name": "f", "call_id": "a", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "a", "output": "1"},
    ]
    listed = [listed_item(item, str(index)) for index, item in enumerate(items)]
    page = {"object": "list", "data": listed, "first_id": "a", "last_id": "b", "has_more": False}
    kinds = [type(item).__name__ for item in ResponseItemList.model_validate(page, strict=True).data]
    assert kinds == [
        "ResponseInputMessageItem",
        "ResponseInputMessageItem",
        "ResponseOutputMessage",
        "ResponseReasoningItem",
        "ResponseFunctionToolCallItem",
        "ResponseFunctionToolCallOutputItem",
    ]
