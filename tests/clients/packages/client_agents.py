"""openai-agents with both of its models of openai: runs with tools, whole and streamed, and with an output type."""

import asyncio

import pytest
from agents import (
    Agent,
    ModelSettings,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    RunConfig,
    Runner,
    function_tool,
)
from asks import API_KEY, BASE_URL, FACT, FACT_QUESTION, MODEL, WEATHER_QUESTION, Report
from openai import AsyncOpenAI
from openai.types.shared import Reasoning

QUIET = RunConfig(tracing_disabled=True)


@pytest.fixture(params=[OpenAIChatCompletionsModel, OpenAIResponsesModel])
def agent(request):
    def make(**options):
        client = AsyncOpenAI(base_url=f"{BASE_URL}/v1", api_key=API_KEY, max_retries=0)
        return Agent(name="a", model=request.param(model=MODEL, openai_client=client), **options)

    return make


def run(asked, question):
    async def once():
        return await Runner.run(asked, question, run_config=QUIET)

    return asyncio.run(once())


def weather_tool(asked):
    @function_tool
    def get_weather(city: str) -> str:
        """Current weather"""
        asked.append(city)
        return f"It is sunny in {city}."

    return get_weather


def test_text(agent):
    assert run(agent(), FACT_QUESTION).final_output == FACT


def test_text_streamed(agent):
    async def read():
        result = Runner.run_streamed(agent(), FACT_QUESTION, run_config=QUIET)
        return [event.data async for event in result.stream_events() if event.type == "raw_response_event"], result

    events, result = asyncio.run(read())
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == FACT
    assert result.final_output == FACT


def test_a_summary_of_the_reasoning_goes_back_with_the_next_turn():
    async def both():
        client = AsyncOpenAI(base_url=f"{BASE_URL}/v1", api_key=API_KEY, max_retries=0)
        settings = ModelSettings(reasoning=Reasoning(summary="detailed"))
        asked = Agent(name="a", model=OpenAIResponsesModel(model=MODEL, openai_client=client), model_settings=settings)
        first = await Runner.run(asked, FACT_QUESTION, run_config=QUIET)
        turns = [*first.to_input_list(), {"role": "user", "content": FACT_QUESTION}]
        return first, await Runner.run(asked, turns, run_config=QUIET)

    first, second = asyncio.run(both())
    [item] = [item.raw_item for item in first.new_items if item.type == "reasoning_item"]
    assert item.summary[0].text
    assert second.final_output


def test_an_output_type(agent):
    settings = ModelSettings(max_tokens=400)
    assert isinstance(run(agent(output_type=Report, model_settings=settings), WEATHER_QUESTION).final_output, Report)


def test_a_tool_by_choice(agent):
    asked = []
    assert run(agent(tools=[weather_tool(asked)]), WEATHER_QUESTION).final_output
    assert asked[:1] == ["Paris"]


def test_a_tool_that_must_be_called(agent):
    asked = []
    settings = ModelSettings(tool_choice="required", parallel_tool_calls=False, max_tokens=400)
    run(
        agent(tools=[weather_tool(asked)], model_settings=settings, tool_use_behavior="stop_on_first_tool"),
        WEATHER_QUESTION,
    )
    assert asked == ["Paris"]


def test_a_conversation_by_its_last_response():
    async def both():
        client = AsyncOpenAI(base_url=f"{BASE_URL}/v1", api_key=API_KEY, max_retries=0)
        asked = Agent(name="a", model=OpenAIResponsesModel(model=MODEL, openai_client=client))
        first = await Runner.run(asked, "Hello.", run_config=QUIET)
        again = {"previous_response_id": first.last_response_id, "run_config": QUIET}
        return first, await Runner.run(asked, FACT_QUESTION, **again)

    first, second = asyncio.run(both())
    assert second.raw_responses[-1].usage.input_tokens > first.raw_responses[-1].usage.input_tokens
    assert second.final_output
