"""pydantic-ai: each of its output modes, and a tool's loop."""

import asyncio

import pytest
from asks import API_KEY, BASE_URL, FACT, FACT_QUESTION, MODEL, WEATHER_QUESTION, Report
from pydantic_ai import Agent, NativeOutput, PromptedOutput, TextOutput, ToolOutput
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider

CHAT = OpenAIChatModel(MODEL, provider=OpenAIProvider(base_url=f"{BASE_URL}/v1", api_key=API_KEY))
SETTINGS = {"max_tokens": 400}


def test_text_whole():
    assert Agent(CHAT).run_sync(FACT_QUESTION).output == FACT


async def streamed():
    async with Agent(CHAT).run_stream(FACT_QUESTION) as run:
        return [text async for text in run.stream_text(delta=True)]


def test_text_streamed():
    assert "".join(asyncio.run(streamed())) == FACT


@pytest.mark.parametrize("mode", [ToolOutput, NativeOutput])
@pytest.mark.parametrize("strict", [None, True, False])
def test_structured(mode, strict):
    output = mode(Report, strict=strict)
    assert isinstance(
        Agent(CHAT, output_type=output, model_settings=SETTINGS, retries=0).run_sync(WEATHER_QUESTION).output, Report
    )


def test_the_type_alone():
    agent = Agent(CHAT, output_type=Report, model_settings=SETTINGS, retries=0)
    assert isinstance(agent.run_sync(WEATHER_QUESTION).output, Report)


def test_prompted():
    """The mode leaves it to the model what its JSON is, so the schema is sent beside the prompt."""
    shaped = {
        **SETTINGS,
        "extra_body": {"response_format": None, "structured_outputs": {"json": Report.model_json_schema()}},
    }
    agent = Agent(CHAT, output_type=PromptedOutput(Report), model_settings=shaped, retries=0)
    assert isinstance(agent.run_sync(WEATHER_QUESTION).output, Report)


def words(text: str) -> list[str]:
    return text.split()


def test_text_through_a_function():
    agent = Agent(CHAT, output_type=TextOutput(words))
    assert agent.run_sync(FACT_QUESTION).output == FACT.split()


def test_a_tool_and_its_result():
    agent, asked = Agent(CHAT, model_settings=SETTINGS), []

    @agent.tool_plain
    def get_weather(city: str) -> str:
        """Current weather"""
        asked.append(city)
        return f"It is sunny in {city}."

    assert agent.run_sync(WEATHER_QUESTION).output
    assert asked[:1] == ["Paris"]
