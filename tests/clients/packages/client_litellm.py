"""LiteLLM, as a vLLM server and as an OpenAI one: reasoning, tools, structured output, streams, errors."""

import litellm
import pytest
from asks import API_KEY, BASE_URL, FACT, FACT_QUESTION, MODEL, NAMED, WEATHER_QUESTION, WEATHER_TOOL, Report, city_of

litellm.telemetry = False
pytestmark = pytest.mark.parametrize("provider", ["hosted_vllm", "openai"])


def ask(provider, question, **options):
    options = {"max_tokens": 400, "num_retries": 0, **options}
    messages = [{"role": "user", "content": question}]
    return litellm.completion(
        f"{provider}/{MODEL}", messages=messages, api_base=f"{BASE_URL}/v1", api_key=API_KEY, **options
    )


def test_an_answer_and_its_reasoning(provider):
    message = ask(provider, FACT_QUESTION).choices[0].message
    assert message.content == FACT
    assert message.reasoning_content


def test_streamed(provider):
    chunks = list(ask(provider, FACT_QUESTION, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == FACT
    whole = litellm.stream_chunk_builder(chunks)
    assert whole.choices[0].message.content == FACT
    assert whole.choices[0].message.reasoning_content
    assert whole.usage.completion_tokens > 0


def test_structured_output(provider):
    answer = ask(provider, WEATHER_QUESTION, response_format=Report)
    Report.model_validate_json(answer.choices[0].message.content)


@pytest.mark.parametrize("choice", ["auto", "required", NAMED])
@pytest.mark.parametrize("stream", [False, True])
def test_a_call(provider, choice, stream):
    one = {"tools": [WEATHER_TOOL], "tool_choice": choice, "parallel_tool_calls": False}
    answer = ask(provider, WEATHER_QUESTION, stream=stream, **one)
    whole = litellm.stream_chunk_builder(list(answer)) if stream else answer
    (call,) = whole.choices[0].message.tool_calls
    assert (call.function.name, city_of(call.function.arguments)) == ("get_weather", "Paris")


def test_a_refusal_keeps_its_status(provider):
    with pytest.raises(litellm.BadRequestError, match="temperature"):
        ask(provider, FACT_QUESTION, temperature=-1)
