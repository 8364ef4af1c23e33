"""anthropic: whole and streamed messages, its `parse`, its stream helper, its tool runner, and its count of tokens."""

import anthropic
import pytest
from anthropic import beta_tool
from asks import API_KEY, BASE_URL, FACT, FACT_QUESTION, MODEL, WEATHER_QUESTION, WEATHER_TOOL, Report

CLIENT = anthropic.Anthropic(base_url=BASE_URL, api_key=API_KEY, max_retries=0)
ASK = {"model": MODEL, "messages": [{"role": "user", "content": WEATHER_QUESTION}], "max_tokens": 400}
FACT_ASK = {**ASK, "messages": [{"role": "user", "content": FACT_QUESTION}]}
FUNCTION = WEATHER_TOOL["function"]
TOOL = {"name": FUNCTION["name"], "description": FUNCTION["description"], "input_schema": FUNCTION["parameters"]}


def test_a_message_and_its_thinking():
    message = CLIENT.messages.create(**FACT_ASK)
    thinking, text = message.content
    assert (thinking.type, text.text, message.stop_reason) == ("thinking", FACT, "end_turn")
    assert message._request_id


def test_the_stream_helper_puts_the_same_together():
    with CLIENT.messages.stream(**FACT_ASK) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_message()
    assert {"message_start", "thinking", "signature", "text", "content_block_stop", "message_stop"} <= kinds
    assert final.content[-1].text == FACT
    with CLIENT.messages.stream(**FACT_ASK) as stream:
        assert "".join(stream.text_stream) == FACT


def test_thinking_turned_off():
    (text,) = CLIENT.messages.create(**FACT_ASK, thinking={"type": "disabled"}).content
    assert text.type == "text"


def test_parse_gives_the_type():
    message = CLIENT.messages.parse(**ASK, output_format=Report)
    assert isinstance(message.parsed_output, Report)


def test_the_stream_helper_parses_at_the_end():
    with CLIENT.messages.stream(**ASK, output_format=Report) as stream:
        final = stream.get_final_message()
    assert isinstance(final.parsed_output, Report)


@pytest.mark.parametrize("choice", [{"type": "auto"}, {"type": "any"}, {"type": "tool", "name": "get_weather"}])
def test_a_call(choice):
    message = CLIENT.messages.create(**ASK, tools=[TOOL], tool_choice={**choice, "disable_parallel_tool_use": True})
    (call,) = [block for block in message.content if block.type == "tool_use"]
    assert (call.name, call.input) == ("get_weather", {"city": "Paris"})
    assert message.stop_reason == "tool_use"


@pytest.mark.parametrize("stream", [False, True])
def test_the_tool_runner_runs_to_the_end(stream):
    asked = []

    @beta_tool
    def get_weather(city: str) -> str:
        """Current weather"""
        asked.append(city)
        return f"It is sunny in {city}."

    runner = CLIENT.beta.messages.tool_runner(**ASK, tools=[get_weather], stream=stream)
    final = runner.until_done()
    assert asked[:1] == ["Paris"]
    assert final.content


def test_an_answer_goes_back_as_it_came():
    asked = {**ASK, "tools": [TOOL], "tool_choice": {"type": "any", "disable_parallel_tool_use": True}}
    first = CLIENT.messages.create(**asked)
    (call,) = [block for block in first.content if block.type == "tool_use"]
    result = {"type": "tool_result", "tool_use_id": call.id, "content": f"It is sunny in {call.input['city']}."}
    turns = [*ASK["messages"], {"role": "assistant", "content": first.content}, {"role": "user", "content": [result]}]
    second = CLIENT.messages.create(**{**ASK, "messages": turns}, tools=[TOOL])
    assert second.stop_reason in ("end_turn", "tool_use")
    assert second.usage.cache_read_input_tokens > 0


def test_tokens_are_counted():
    usage = CLIENT.messages.create(**ASK).usage
    counted = CLIENT.messages.count_tokens(model=MODEL, messages=ASK["messages"])
    assert counted.input_tokens == usage.input_tokens + usage.cache_read_input_tokens


def test_errors_are_the_packages():
    with pytest.raises(anthropic.BadRequestError, match="max_tokens"):
        CLIENT.messages.create(**{**ASK, "max_tokens": -1})
    with pytest.raises(anthropic.NotFoundError, match="gpt"):
        CLIENT.messages.create(**{**ASK, "model": "gpt"})
