"""openai: whole and streamed answers, its `parse` and stream helpers, and forced tools."""

import json

import openai
import pytest
from asks import API_KEY, BASE_URL, FACT, FACT_QUESTION, MODEL, NAMED, WEATHER_QUESTION, WEATHER_TOOL, Report, city_of
from pydantic import BaseModel, Field

CLIENT = openai.OpenAI(base_url=f"{BASE_URL}/v1", api_key=API_KEY, max_retries=0)
CHAT = CLIENT.chat.completions
ASK = {"model": MODEL, "messages": [{"role": "user", "content": WEATHER_QUESTION}], "max_tokens": 400}


class get_weather(BaseModel):
    """Current weather"""

    city: str = Field(max_length=12)


def test_an_answer_and_its_reasoning():
    message = CHAT.create(model=MODEL, messages=[{"role": "user", "content": FACT_QUESTION}]).choices[0].message
    assert message.content == FACT
    assert message.reasoning_content


def test_the_stream_helper_puts_the_same_together():
    with CHAT.stream(model=MODEL, messages=[{"role": "user", "content": FACT_QUESTION}]) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()
    assert {"chunk", "content.delta", "content.done"} <= kinds
    assert final.choices[0].message.content == FACT


def test_parse_gives_the_type():
    message = CHAT.parse(**ASK, response_format=Report).choices[0].message
    assert isinstance(message.parsed, Report)


def test_the_stream_helper_parses_on_the_way():
    with CHAT.stream(**ASK, response_format=Report) as stream:
        seen = [event.parsed for event in stream if event.type == "content.delta"]
        final = stream.get_final_completion()
    assert isinstance(final.choices[0].message.parsed, Report)
    assert seen[-1] == final.choices[0].message.parsed.model_dump()


def test_json_object():
    shaped = {"type": "json_object"}
    choice = CHAT.create(**ASK, response_format=shaped).choices[0]
    if choice.finish_reason == "stop":
        assert isinstance(json.loads(choice.message.content), dict)
    else:  # nothing says how long an object may be
        assert choice.message.content.lstrip().startswith("{")


@pytest.mark.parametrize("strict", [True, False, None])
def test_a_schema_strict_or_not(strict):
    shaped = {"type": "json_schema", "json_schema": {"name": "report", "schema": Report.model_json_schema()}}
    if strict is not None:
        shaped["json_schema"]["strict"] = strict
    Report.model_validate_json(CHAT.create(**ASK, response_format=shaped).choices[0].message.content)


@pytest.mark.parametrize("choice", ["auto", "required", NAMED])
def test_a_call(choice):
    answer = CHAT.create(**ASK, tools=[WEATHER_TOOL], tool_choice=choice).choices[0]
    (call,) = answer.message.tool_calls
    assert (call.function.name, city_of(call.function.arguments)) == ("get_weather", "Paris")
    assert answer.finish_reason == ("stop" if choice is NAMED else "tool_calls")


def test_a_call_of_a_tool_that_fits_nothing_is_forced():
    messages = [{"role": "user", "content": FACT_QUESTION}]
    answer = CHAT.create(**{**ASK, "messages": messages}, tools=[WEATHER_TOOL], tool_choice="required").choices[0]
    assert answer.message.tool_calls
    assert all(city_of(call.function.arguments) for call in answer.message.tool_calls)


def test_parse_of_a_strict_tool():
    tools = [openai.pydantic_function_tool(get_weather)]
    (call,) = (
        CHAT.parse(**ASK, tools=tools, tool_choice="required", parallel_tool_calls=False).choices[0].message.tool_calls
    )
    assert call.function.parsed_arguments == get_weather(city="Paris")


def test_the_stream_helper_reports_a_call():
    tools = [openai.pydantic_function_tool(get_weather)]
    with CHAT.stream(**ASK, tools=tools, tool_choice=NAMED) as stream:
        done = [event for event in stream if event.type == "tool_calls.function.arguments.done"]
    assert [event.parsed_arguments for event in done] == [get_weather(city="Paris")]


def test_choices_and_a_regex_by_extra_body():
    for constraint, valid in (
        ({"structured_outputs": {"choice": ["yes", "no"]}}, {"yes", "no"}),
        ({"guided_choice": ["red", "blue"]}, {"red", "blue"}),
        ({"guided_regex": "[0-9]{3}"}, {f"{number:03}" for number in range(1000)}),
        ({"regex": "ab|cd"}, {"ab", "cd"}),
    ):
        assert CHAT.create(**ASK, extra_body=constraint).choices[0].message.content in valid
