"""openai's `responses`: whole, streamed, parsed, by tools, in the background, and as a conversation."""

import json
import time

import pytest
from asks import API_KEY, BASE_URL, FACT, FACT_QUESTION, MODEL, WEATHER_QUESTION, WEATHER_TOOL, Report, city_of
from openai import NotFoundError, OpenAI

TOOL = {"type": "function", **WEATHER_TOOL["function"], "strict": True}
LAST_S = 60


@pytest.fixture
def responses():
    with OpenAI(base_url=f"{BASE_URL}/v1", api_key=API_KEY, max_retries=0) as client:
        yield client.responses


def test_whole(responses):
    made = responses.create(model=MODEL, input=FACT_QUESTION, temperature=0)
    assert (made.output_text, made.status) == (FACT, "completed")
    assert made.output[0].type == "reasoning"
    assert responses.retrieve(made.id) == made


def test_the_stream_helper(responses):
    with responses.stream(model=MODEL, input=FACT_QUESTION, temperature=0) as stream:
        text = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
        final = stream.get_final_response()
    assert (text, final.output_text) == (FACT, FACT)


def test_a_summary_is_the_reasoning(responses):
    asked = {"model": MODEL, "input": FACT_QUESTION, "temperature": 0}
    plain = responses.create(**asked).output[0].content[0].text
    with responses.stream(**asked, reasoning={"summary": "auto"}) as stream:
        events = list(stream)
    told = "".join(event.delta for event in events if event.type == "response.reasoning_summary_text.delta")
    item = events[-1].response.output[0]
    assert plain
    assert told == plain
    assert ([part.text for part in item.summary], item.content) == ([plain], [])


def test_parsed(responses):
    made = responses.parse(model=MODEL, input=WEATHER_QUESTION, text_format=Report, max_output_tokens=400)
    assert isinstance(made.output_parsed, Report)


def test_a_tool_and_its_result(responses):
    made = responses.create(
        model=MODEL, input=WEATHER_QUESTION, tools=[TOOL], tool_choice="required", parallel_tool_calls=False
    )
    [call] = [item for item in made.output if item.type == "function_call"]
    assert call.name == "get_weather"
    result = {"type": "function_call_output", "call_id": call.call_id, "output": f"Sunny in {city_of(call.arguments)}."}
    told = responses.create(model=MODEL, input=[result], previous_response_id=made.id, tools=[TOOL], temperature=0)
    by_hand = [{"role": "user", "content": WEATHER_QUESTION}, *made.output, result]
    again = responses.create(model=MODEL, input=by_hand, tools=[TOOL], temperature=0)
    assert told.output_text == again.output_text


def test_the_arguments_of_a_streamed_call(responses):
    with responses.stream(model=MODEL, input=WEATHER_QUESTION, tools=[TOOL], tool_choice="required") as stream:
        pieces = [event for event in stream if event.type == "response.function_call_arguments.delta"]
        final = stream.get_final_response()
    first = next(item for item in final.output if item.type == "function_call")
    assert json.loads(first.arguments)
    assert "".join(piece.delta for piece in pieces if piece.item_id == first.id) == first.arguments


def test_in_the_background(responses):
    made = responses.create(model=MODEL, input=FACT_QUESTION, background=True, temperature=0)
    for _ in range(LAST_S):
        if made.status not in ("queued", "in_progress"):
            break
        time.sleep(1)
        made = responses.retrieve(made.id)
    assert made.output_text == FACT


def test_a_stream_from_the_middle(responses):
    events = list(responses.create(model=MODEL, input=FACT_QUESTION, stream=True, background=True, temperature=0))
    middle = events[len(events) // 2].sequence_number
    rest = list(responses.retrieve(events[0].response.id, stream=True, starting_after=middle))
    assert rest[-1] == events[-1]
    texts = [
        "".join(event.delta for event in some if event.type == "response.output_text.delta")
        for some in (rest, [event for event in events if event.sequence_number > middle])
    ]
    assert texts[0] == texts[1]


def test_deleted(responses):
    made = responses.create(model=MODEL, input=FACT_QUESTION, max_output_tokens=2)
    assert made.status == "incomplete"
    responses.delete(made.id)
    with pytest.raises(NotFoundError):
        responses.retrieve(made.id)
