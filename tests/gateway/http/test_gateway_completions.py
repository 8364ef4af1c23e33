"""Answers of completions from deltas, and answers in the words of an API that this gateway does not have."""

import asyncio
import json
import sys
from array import array
from typing import Any, ClassVar

import pytest

from services.gateway.dialects.chat_events import AnswerHead
from services.gateway.dialects.completion_events import CompletionChunks, CompletionForm, completion_usage
from services.gateway.dialects.completion_logprobs import token_name
from services.gateway.dialects.event_ids import EventIds, NoEventIds
from services.gateway.dialects.prompt_logprobs import TokenTexts
from services.gateway.http.answer import AnswerWriter
from services.gateway.http.context import RequestContext
from services.gateway.inflight.request import OpenRequest, StreamPosition
from services.gateway.request.answer_format import AnswerFormat
from services.gateway.request.completion import decode_completion
from shared.messages import Delta, PromptLogprobs, ShownLogprob, Usage, pack_ids

HEAD = AnswerHead("cmpl-1", 123, "m", "fp_1")
USAGE = Usage(3, 2, 0, 1, 0, 0)


class Letters:
    """A token is a byte; 0 is special."""

    control: ClassVar[dict[str, int]] = {"</s>": 0}

    def token_bytes(self, token_id: int) -> bytes:
        return bytes([token_id]) if token_id else b""


TEXTS = TokenTexts(Letters())


def floats(*values: float) -> bytes:
    packed = array("f", values)
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()


# The prompt `</s>é`: the second byte of é was the likeliest, and the first the second to `a`.
PROMPT = [0, 0xC3, 0xA9]
SCORES = PromptLogprobs(1, floats(-2, -0.5, -0.25, -0.25), pack_ids([ord("a"), 0xA9]), pack_ids([2, 1]))


def chunks(form: CompletionForm, *deltas: Delta, ids: EventIds | None = None, skip: int = 0) -> list[dict[str, Any]]:
    """The choice of each event."""
    writer = CompletionChunks(HEAD, 1, form, TEXTS, usage=False, continuous_usage=False)
    data = b"".join(writer.delta(0, delta, ids or NoEventIds(), skip) for delta in deltas)
    return [json.loads(event.rpartition(b"data: ")[2])["choices"][0] for event in data.split(b"\n\n")[:-1]]


FIRST = Delta(
    "r",
    1,
    content="b\u2028",
    logprobs=(ShownLogprob("b\u2028", "b\u2028".encode(), -1.5, (("</s>", b"", -0.5),)),),
    token_ids=(98,),
    prompt=pack_ids(PROMPT),
    prompt_logprobs=SCORES,
)
LAST = Delta("r", 2, finish_reason="length", usage=USAGE, start=1)


def test_an_echo_is_the_first_event_with_the_scores_of_the_prompt() -> None:
    echo, text, finish = chunks(CompletionForm(echo=True, logprobs=1), FIRST, LAST)
    assert (echo["text"], text["text"], finish["text"]) == ("</s>é", "b\u2028", "")
    assert [one["finish_reason"] for one in (echo, text, finish)] == [None, None, "length"]
    assert echo["logprobs"] == {
        "tokens": ["</s>", "bytes:\\xc3", "bytes:\\xa9"],
        "token_logprobs": [None, -2, -0.25],
        "top_logprobs": [None, {"a": -0.5, "bytes:\\xc3": -2}, {"bytes:\\xa9": -0.25}],
        "text_offset": [0, 4, 4],
    }
    assert text["logprobs"]["text_offset"] == [5]
    assert text["logprobs"]["top_logprobs"] == [{"</s>": -0.5, "b\u2028": -1.5}]


def test_a_client_that_has_a_part_of_a_delta_gets_the_rest() -> None:
    form = CompletionForm(echo=True, token_ids=True)
    everything = chunks(form, FIRST, ids=EventIds([StreamPosition(0)]))
    assert everything[0]["prompt_token_ids"] == PROMPT
    assert chunks(form, FIRST, ids=EventIds([StreamPosition(0)]), skip=1) == everything[1:]


def test_an_answer_of_no_tokens_shows_its_prompt_alone() -> None:
    echo, finish = chunks(CompletionForm(echo=True, logprobs=0, scores_only=True), FIRST, LAST)
    assert (echo["logprobs"]["token_logprobs"], finish["finish_reason"]) == ([None, -2, -0.25], "length")
    assert echo["logprobs"]["top_logprobs"][1] == {"bytes:\\xc3": -2}
    assert completion_usage([USAGE], CompletionForm(scores_only=True))["total_tokens"] == 3


def test_an_engine_of_an_older_release_gives_no_scores() -> None:
    older = Delta("r", 1, content="b", token_ids=(98,), prompt=pack_ids(PROMPT))
    echo, _ = chunks(CompletionForm(echo=True, logprobs=1), older)
    assert (echo["text"], echo["logprobs"]["token_logprobs"]) == ("</s>é", [None, None, None])


def test_each_prompt_counts_once() -> None:
    usages = [Usage(tokens, 2, 0, 0, 0, 0) for tokens in (3, 3, 5, 5)]
    total = completion_usage(usages, CompletionForm(prompts=2))
    assert (total["prompt_tokens"], total["completion_tokens"], total["total_tokens"]) == (8, 8, 16)


@pytest.mark.parametrize(("data", "name"), [(b"a", "a"), ("€".encode(), "€"), (b"\xe2\x82", "bytes:\\xe2\\x82")])
def test_names_of_tokens_are_those_of_openai(data: bytes, name: str) -> None:
    assert token_name(data) == name


@pytest.mark.parametrize("stream", [False, True])
async def test_an_api_that_only_a_newer_gateway_has_is_a_failure_that_says_so(stream: bool) -> None:
    """Two builds stand side by side in an update, and read each other's records."""
    request = OpenRequest("1" * 16, AnswerFormat(dialect="of tomorrow"), stream, 0, 0, 1 << 20, 0)
    request.add(request.choices[0], [Delta("1" * 16, 1, finish_reason="stop", usage=USAGE)], 0)
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        await asyncio.Event().wait()

    await AnswerWriter({}, "fp_1", 0).respond(request, RequestContext("id", "", None, send), receive, send)
    assert sent[0]["status"] == 503
    assert json.loads(sent[1]["body"])["error"]["code"] == "unknown_api"


@pytest.mark.parametrize(("given", "asked"), [("null", 16), ("0", 1), ("9", 9), ("-1", -1)])
def test_the_most_tokens_of_an_answer(given: str, asked: int) -> None:
    body = decode_completion(b'{"prompt": "a", "max_tokens": %b}' % given.encode())
    assert body.as_chat().max_tokens == asked
    assert body.scores_only is (given == "0")
