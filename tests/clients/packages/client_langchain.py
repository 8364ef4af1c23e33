"""LangChain: chat, tools, and `with_structured_output` by each of its methods."""

import openai
import pytest
from asks import API_KEY, BASE_URL, FACT, FACT_QUESTION, MODEL, WEATHER_QUESTION, Report
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI

OPTIONS = {"base_url": f"{BASE_URL}/v1", "api_key": API_KEY, "model": MODEL, "max_retries": 0, "max_tokens": 400}
MODEL_ = ChatOpenAI(**OPTIONS)


@tool
def get_weather(city: str) -> str:
    """Current weather"""
    return f"It is sunny in {city}."


def test_chat_whole_and_streamed():
    assert MODEL_.invoke(FACT_QUESTION).content == FACT
    chunks = list(ChatOpenAI(**OPTIONS, stream_usage=True).stream(FACT_QUESTION))
    assert "".join(chunk.content for chunk in chunks) == FACT
    assert sum(chunk.usage_metadata["output_tokens"] for chunk in chunks if chunk.usage_metadata) > 0


@pytest.mark.parametrize("strict", [None, True, False])
@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_structured_output(method, strict):
    asked = MODEL_.with_structured_output(Report, method=method, strict=strict, include_raw=True)
    answer = asked.invoke(WEATHER_QUESTION)
    assert answer["parsing_error"] is None
    assert isinstance(answer["parsed"], Report)


def test_structured_output_in_json_mode():
    """The mode promises an object and no more; what the object must be is said by the field beside it."""
    shaped = {"structured_outputs": {"json": Report.model_json_schema()}}
    asked = ChatOpenAI(**OPTIONS).with_structured_output(Report, method="json_mode", include_raw=True)
    try:
        content = asked.invoke(WEATHER_QUESTION)["raw"].content
    except openai.LengthFinishReasonError as error:  # nothing says how long an object may be
        content = error.completion.choices[0].message.content
    assert content.lstrip().startswith("{")
    assert isinstance(Report.model_validate_json(ChatOpenAI(**OPTIONS, extra_body=shaped).invoke("x").content), Report)


def test_structured_output_streamed():
    *_, last = MODEL_.with_structured_output(Report, method="json_schema").stream(WEATHER_QUESTION)
    assert isinstance(last, Report)


@pytest.mark.parametrize("choice", [None, "auto", "any", "required", "get_weather"])
def test_a_tool_and_its_result(choice):
    asked = MODEL_.bind_tools([get_weather], tool_choice=choice, parallel_tool_calls=False)
    reply = asked.invoke(WEATHER_QUESTION)
    (call,) = reply.tool_calls
    assert (call["name"], call["args"]) == ("get_weather", {"city": "Paris"})
    result = ToolMessage(get_weather.invoke(call["args"]), tool_call_id=call["id"])
    after = MODEL_.bind_tools([get_weather]).invoke([HumanMessage(WEATHER_QUESTION), reply, result])
    assert after.content or after.tool_calls


def test_a_tool_streamed():
    first, *chunks = MODEL_.bind_tools([get_weather], strict=True).stream(WEATHER_QUESTION)
    for chunk in chunks:
        first += chunk
    assert [(call["name"], call["args"]) for call in first.tool_calls] == [("get_weather", {"city": "Paris"})]
