"""Answers with calls, well and badly written, as openai's client reads them, streamed and whole."""

import json

import pytest
from openai.lib.streaming.chat import ChatCompletionStreamState
from openai.types.chat import ChatCompletion, ChatCompletionChunk, ChatCompletionToolUnionParam
from postproc_stand_in import BEGIN, StandIn, cut, every_byte, request
from test_postproc_reasoning_calls import CALLS, THOUGHTS
from test_postproc_tool_calls import NOT_CALLS, WELL

from services.gateway.dialects.chat_events import (
    AnswerHead,
    ChunkWriter,
    choice_json,
    completion_body,
    total_usage,
)
from services.gateway.dialects.collected import CollectedChoice
from services.gateway.dialects.event_ids import EventIds
from services.gateway.inflight.request import StreamPosition
from services.postproc.text.answer import Answer, Parsers
from services.postproc.text.detokenize import Vocabulary
from shared.messages import Delta, Finish, Usage

HEAD = AnswerHead("chatcmpl-1", 1, "m", "fp")
TEXTS = {
    **{f"call, {name}": "Hm.\n</think>\n\n" + text for name, (text, _, _) in WELL.items()},
    **{f"text, {name}": "Hm.\n</think>\n\n" + text for name, text in NOT_CALLS.items()},
    **{f"call in thinking, {name}": text for name, (text, _, _) in CALLS.items()},
    **{f"thinking, {name}": text for name, text in THOUGHTS.items()},
}


def answer(text: str, places: list[int], finish: str) -> list[Delta]:
    pieces = cut(text, places)
    tokenizer = StandIn([piece for piece in pieces if isinstance(piece, bytes)])
    folded = Answer(request(tools=True, functions=("f", "g")), Vocabulary(tokenizer), Parsers())
    folded.begin = BEGIN
    deltas = []
    for token in tokenizer.tokens(pieces):
        folded.push_token(token)
        deltas.append(folded.take_delta())
    folded.apply_finish(Finish(finish))  # type: ignore[arg-type]
    return [delta for delta in [*deltas, folded.take_delta()] if delta]


def streamed(deltas: list[Delta]) -> ChatCompletion:
    # A strict tool makes the client parse its arguments, as far as they have come, after every chunk. Such a client
    # takes no answer that a limit cut off.
    cut_off = deltas[-1].finish_reason == "length"
    tools: list[ChatCompletionToolUnionParam] = [
        {"type": "function", "function": {"name": name, "strict": True, "parameters": {}}} for name in ("f", "g")
    ]
    state = ChatCompletionStreamState(input_tools=[] if cut_off else tools)
    chunks, ids = ChunkWriter(HEAD, 1, include_usage=False), EventIds([StreamPosition(0)])
    events = chunks.first_chunks(ids.line()) + b"".join(chunks.delta(0, delta, ids) for delta in deltas)
    for event in events.split(b"\n\n")[:-1]:
        state.handle_chunk(ChatCompletionChunk.model_validate_json(event.rpartition(b"data: ")[2]))
    return state.current_completion_snapshot if cut_off else state.get_final_completion()


def whole(deltas: list[Delta]) -> ChatCompletion:
    collected = CollectedChoice()
    for delta in deltas:
        collected.add(delta)
    usage = total_usage([Usage(1, 1, 0, 0, 0, 0)])
    choice = choice_json(collected, 0, with_logprobs=False, with_ids=False)
    return ChatCompletion.model_validate_json(completion_body(HEAD, [choice], usage))


def parts(completion: ChatCompletion) -> dict[str, object]:
    choice = completion.choices[0]
    calls = [call for call in choice.message.tool_calls or [] if call.type == "function"]
    return {
        "content": choice.message.content or "",
        "reasoning": (choice.message.model_extra or {}).get("reasoning_content", ""),
        "calls": [(call.id, call.function.name, json.loads(call.function.arguments)) for call in calls],
        "finish_reason": choice.finish_reason,
    }


@pytest.mark.parametrize("finish", ["stop", "length"])
@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_streamed_and_whole_are_the_same_to_openai(text: str, finish: str) -> None:
    expected = parts(whole(answer(text, [], finish)))
    assert parts(streamed(answer(text, every_byte(text), finish))) == expected
    assert isinstance(expected["calls"], list)
    assert all(isinstance(arguments, dict) for _, _, arguments in expected["calls"])
    assert (expected["finish_reason"] == "tool_calls") == (finish == "stop" and bool(expected["calls"]))
