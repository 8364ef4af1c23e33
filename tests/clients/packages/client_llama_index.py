"""LlamaIndex: chat, tools, and structured predictions by tools and by a schema."""

import pytest
from asks import API_KEY, BASE_URL, FACT, FACT_QUESTION, MODEL, WEATHER_QUESTION, Report
from llama_index.core.prompts import PromptTemplate
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai_like import OpenAILike


def llm(**options):
    return OpenAILike(
        model=MODEL,
        api_base=f"{BASE_URL}/v1",
        api_key=API_KEY,
        is_chat_model=True,
        is_function_calling_model=True,
        max_retries=0,
        max_tokens=400,
        **options,
    )


def get_weather(city: str) -> str:
    """Current weather"""
    return f"It is sunny in {city}."


def test_chat_whole_and_streamed():
    assert llm().complete(FACT_QUESTION).text == FACT
    assert "".join(part.delta or "" for part in llm().stream_complete(FACT_QUESTION)) == FACT


@pytest.mark.parametrize("by_schema", [False, True])
def test_a_structured_prediction(by_schema):
    asked = llm(should_use_structured_outputs=by_schema)
    assert isinstance(asked.structured_predict(Report, PromptTemplate(WEATHER_QUESTION)), Report)
    assert isinstance(asked.as_structured_llm(Report).complete(WEATHER_QUESTION).raw, Report)


def test_a_structured_prediction_streamed():
    """By a schema: with tools LlamaIndex streams with `tool_choice` auto, and small models leave fields out."""
    asked = llm(should_use_structured_outputs=True)
    *_, last = asked.stream_structured_predict(Report, PromptTemplate(WEATHER_QUESTION))
    Report.model_validate(last.model_dump())


@pytest.mark.parametrize("required", [False, True])
def test_a_tool(required):
    tool = FunctionTool.from_defaults(get_weather)
    asked = llm()
    reply = asked.chat_with_tools([tool], WEATHER_QUESTION, tool_required=required)
    (call,) = asked.get_tool_calls_from_response(reply)
    assert (call.tool_name, call.tool_kwargs) == ("get_weather", {"city": "Paris"})
