"""The unmodified `anthropic` package against the running system, and the traffic of a coding agent."""

import base64
import json
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest
from machine import PATIENCE_S
from scripted_model import CONTENT_WITHOUT_TOOLS, REASONING
from system import System, encoded, picture

anthropic = pytest.importorskip("anthropic", reason="needs the extra test")

API_KEY = "a-secret"
QUESTION = [{"role": "user", "content": "What is the weather in Paris?"}]
SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 8}, "days": {"enum": [1, 2, 3]}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOL = {"name": "get_weather", "description": "Current weather", "input_schema": SCHEMA}
PNG = base64.b64encode(encoded(picture(150, 100), "PNG")).decode()
IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": PNG}}
SHORT = {"type": "enabled", "budget_tokens": 8}
EPHEMERAL = {"type": "ephemeral"}
GREEDY = {"extra_body": {"temperature": 0}}  # a field of the API that the package has no argument for any more


@pytest.fixture
def client(system: System) -> Iterator[Any]:
    with anthropic.Anthropic(base_url=system.base_url, api_key="none", max_retries=0, timeout=PATIENCE_S) as made:
        yield made


@pytest.fixture
def scripted(scripted_system: System) -> Iterator[Any]:
    url = scripted_system.base_url
    with anthropic.Anthropic(base_url=url, api_key=API_KEY, max_retries=0, timeout=PATIENCE_S) as made:
        yield made


def whole(client: Any, **fields: Any) -> Any:
    return client.messages.create(**{"model": "default", "max_tokens": 24, **GREEDY, **fields})


def streamed(client: Any, **fields: Any) -> Any:
    with client.messages.stream(**{"model": "default", "max_tokens": 24, **GREEDY, **fields}) as stream:
        return stream.get_final_message()


def content(message: Any) -> dict[str, Any]:
    """A message without its ids and what of its prompt was cached; the type of each block is checked."""
    anthropic.types.Message.model_validate(message.model_dump(), strict=True)
    usage = message.usage
    prompt = usage.input_tokens + usage.cache_read_input_tokens
    blocks = [block.model_dump(exclude={"id", "signature"}, exclude_none=True) for block in message.content]
    ended = (message.stop_reason, message.stop_sequence)
    return {"blocks": blocks, "prompt": prompt, "output": usage.output_tokens, "ended": ended}


CONVERSATIONS: dict[str, dict[str, Any]] = {
    "text": {"messages": QUESTION},
    "system and history": {
        "system": [{"type": "text", "text": "Be brief.", "cache_control": EPHEMERAL}],
        "messages": [
            {"role": "user", "content": "Hello."},
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "A greeting.", "signature": "s"},
                    {"type": "text", "text": "Hi."},
                ],
            },
            *QUESTION,
        ],
    },
    "picture": {"messages": [{"role": "user", "content": [IMAGE, {"type": "text", "text": "Describe it."}]}]},
    "no thinking": {"messages": QUESTION, "thinking": {"type": "disabled"}},
    "beginning of the answer": {"messages": [*QUESTION, {"role": "assistant", "content": "It is"}]},
    "a tool that must be called": {
        "messages": QUESTION,
        "tools": [TOOL],
        "tool_choice": {"type": "any", "disable_parallel_tool_use": True},
        "thinking": SHORT,
        "max_tokens": 200,
    },
    "a schema": {
        "messages": QUESTION,
        "output_config": {"format": {"type": "json_schema", "schema": SCHEMA}},
        "thinking": SHORT,
        "max_tokens": 200,
    },
}


@pytest.mark.parametrize("asked", CONVERSATIONS.values(), ids=CONVERSATIONS)
def test_streamed_and_whole_answers_are_the_same(client: Any, asked: dict[str, Any]) -> None:
    answer = content(whole(client, **asked))
    assert content(streamed(client, **asked)) == answer
    assert answer["output"] > 0
    counted = {name: value for name, value in asked.items() if name != "max_tokens"}
    assert client.messages.count_tokens(model="default", **counted).input_tokens == answer["prompt"]


@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "get_weather"}])
def test_the_input_of_a_forced_call_validates(client: Any, choice: dict[str, Any]) -> None:
    fields = {"messages": QUESTION, "tools": [TOOL], "thinking": SHORT, "max_tokens": 300}
    message = whole(client, tool_choice={**choice, "disable_parallel_tool_use": True}, **fields)
    (call,) = [block for block in message.content if block.type == "tool_use"]
    jsonschema.validate(call.input, SCHEMA)
    assert message.stop_reason == "tool_use"


def test_text_of_a_schema_validates(client: Any) -> None:
    message = whole(client, **CONVERSATIONS["a schema"])
    jsonschema.validate(json.loads(message.content[-1].text), SCHEMA)


@pytest.mark.parametrize("ask", [whole, streamed])
def test_reasoning_then_a_call(scripted: Any, ask: Any) -> None:
    message = ask(scripted, model="script", messages=QUESTION, max_tokens=50, tools=[TOOL])
    thinking, call = message.content
    assert (thinking.type, thinking.thinking) == ("thinking", REASONING)
    assert (call.type, call.name, call.input) == ("tool_use", "get_weather", {"city": "Paris"})
    assert message.stop_reason == "tool_use"
    assert message.usage.output_tokens_details.thinking_tokens == 9


@pytest.mark.parametrize("ask", [whole, streamed])
@pytest.mark.parametrize(
    ("stops", "text", "ended"),
    [
        (["rguments", "no such"], CONTENT_WITHOUT_TOOLS.partition("rguments")[0], ("stop_sequence", "rguments")),
        (["no such"], CONTENT_WITHOUT_TOOLS, ("end_turn", None)),
    ],
)
def test_the_stop_sequence_that_was_met(
    scripted: Any, ask: Any, stops: list[str], text: str, ended: tuple[str, str | None]
) -> None:
    message = ask(scripted, model="script", messages=QUESTION, max_tokens=50, stop_sequences=stops)
    assert message.content[-1].text.lstrip("\n") == text
    assert (message.stop_reason, message.stop_sequence) == ended


def test_a_limit_of_the_request_or_of_the_context(client: Any, scripted: Any) -> None:
    assert whole(scripted, model="script", messages=QUESTION, max_tokens=3).stop_reason == "max_tokens"
    with pytest.raises(anthropic.BadRequestError, match="context length"):
        whole(client, messages=[{"role": "user", "content": "0 " * 5000}])


def test_a_picture_that_is_none_is_a_400_that_names_its_block(client: Any) -> None:
    broken = {"type": "image", "source": {**IMAGE["source"], "data": base64.b64encode(b"pixels").decode()}}
    for ask in (whole, streamed):
        with pytest.raises(anthropic.BadRequestError, match=r"messages\[0\].content\[0\].source"):
            ask(client, messages=[{"role": "user", "content": [broken]}])
    with pytest.raises(anthropic.BadRequestError, match=r"messages\[0\].content\[0\].source"):
        client.messages.count_tokens(model="default", messages=[{"role": "user", "content": [broken]}])


def test_a_stream_goes_on_after_a_service_was_killed(client: Any, system: System) -> None:
    """Whatever the process had is made again, and the client notices a pause at most."""
    asked = {"messages": QUESTION, "max_tokens": 300, "model": "default", **GREEDY}
    undisturbed = content(whole(client, **asked))
    with client.messages.stream(**asked) as stream:
        pieces = iter(stream)
        for event in pieces:
            if event.type == "content_block_delta":
                break
        system.kill_child("services.postproc")
        for _ in pieces:
            pass
        assert content(stream.get_final_message()) == undisturbed


# ------------------------------------------------------------------------------------------------------ a coding agent

NAMES = ("Bash", "Edit", "Glob", "Grep", "Read", "Task", "TodoWrite", "WebFetch", "Write", "mcp__tracker__find_issue")
TOOLS = [
    {
        "name": name,
        "description": f"{name}: does to files what its name says. Give absolute paths.",
        "input_schema": {
            "type": "object",
            "$schema": "http://json-schema.org/draft-07/schema#",
            "properties": {"path": {"type": "string", "description": "An absolute path"}, "limit": {"type": "integer"}},
            "required": ["path"],
            "additionalProperties": False,
        },
    }
    for name in NAMES
]
AGENT: dict[str, Any] = {
    "model": "default",
    "max_tokens": 32,
    "betas": ["claude-code-20250219", "interleaved-thinking-2025-05-14", "fine-grained-tool-streaming-2025-05-14"],
    "system": [
        {"type": "text", "text": "You are a coding agent.", "cache_control": EPHEMERAL},
        {"type": "text", "text": "Follow the style of the files around. " * 8, "cache_control": EPHEMERAL},
    ],
    "tools": [*TOOLS[:-1], {**TOOLS[-1], "cache_control": EPHEMERAL}],
    "metadata": {"user_id": "user_1_account__session_2"},
    "thinking": {"type": "enabled", "budget_tokens": 16},
    "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
}


def turns(count: int) -> list[Any]:
    """The conversation after `count` rounds of calls: a reminder, text between calls, results in any order."""
    reminder = {"type": "text", "text": "<system-reminder>\nThe list of todos is empty.\n</system-reminder>"}
    conversation: list[Any] = [{"role": "user", "content": [reminder, {"type": "text", "text": "Mend the test."}]}]
    for round_ in range(count):
        calls = [
            {"type": "tool_use", "id": f"toolu_{round_}{i}", "name": name, "input": {"path": f"/src/{name}{round_}"}}
            for i, name in enumerate(("Read", "Grep"))
        ]
        thinking = {"type": "thinking", "thinking": "I look at both.", "signature": "EqQBCgIYAhIM"}
        text = {"type": "text", "text": f"Round {round_}."}
        conversation.append({"role": "assistant", "content": [thinking, text, *calls]})
        results: list[Any] = [
            {"type": "tool_result", "tool_use_id": calls[1]["id"], "content": "No such file.", "is_error": True},
            {
                "type": "tool_result",
                "tool_use_id": calls[0]["id"],
                "content": [{"type": "text", "text": "assert 1 == 2"}],
            },
        ]
        if round_ == count - 1:
            results[-1]["cache_control"] = EPHEMERAL
        conversation.append({"role": "user", "content": [*results, reminder]})
    return conversation


def test_the_traffic_of_a_coding_agent(client: Any) -> None:
    """Each request has the one before in it, and the prefix cache finds that."""
    read = 0
    for rounds in range(3):
        counted = {name: value for name, value in AGENT.items() if name not in ("max_tokens", "metadata")}
        count = client.beta.messages.count_tokens(messages=turns(rounds), **counted).input_tokens
        names = []
        with client.beta.messages.create(messages=turns(rounds), stream=True, **AGENT) as stream:
            for event in stream:
                names.append(event.type)
                if event.type == "message_start":
                    usage = event.message.usage
                    assert usage.input_tokens + usage.cache_read_input_tokens == count
                    assert usage.cache_read_input_tokens >= read
                    read = usage.cache_read_input_tokens
                if event.type == "message_delta":
                    assert event.delta.stop_reason in ("end_turn", "max_tokens", "tool_use")
        assert (names[0], names[-2:]) == ("message_start", ["message_delta", "message_stop"])
        assert names.count("content_block_start") == names.count("content_block_stop") >= 1
    assert read > 0
