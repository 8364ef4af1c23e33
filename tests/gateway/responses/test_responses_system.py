"""Responses of the whole system, with gateways that die: streams that go on, answers that nobody waited for."""

import asyncio
import time
from collections.abc import Iterable, Iterator
from typing import Any

import httpx
import openai
import pytest
from machine import PATIENCE_S
from openai import OpenAI
from openai.types.responses import Response
from page_examples import check, examples
from system import System, data_url, encoded, picture, running

from cli.demo import write_demo

pytestmark = pytest.mark.system

GATEWAY = "services.gateway"
ID = "resp_0123456789abcdef"  # of the page's examples
IMAGE = data_url(encoded(picture(56, 56), "PNG"), "image/png")
TOKENS = 200
# Long enough to be in the middle of it whenever something dies.
LONG: dict[str, Any] = {"max_output_tokens": TOKENS, "extra_body": {"ignore_eos": True, "seed": 7}}
SHORT: dict[str, Any] = {"max_output_tokens": 12, "extra_body": {"seed": 7, "enable_thinking": False}}


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    """Random weights, in float32: what a request is batched with never changes which token is drawn."""
    directory = tmp_path_factory.mktemp("responses")
    write_demo(directory / "demo", dtype="float32")
    with running(["--model", str(directory / "demo"), "--max-model-len", "4096"], directory) as system:
        yield system


@pytest.fixture
def client(system: System) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{system.base_url}/v1", api_key="none", max_retries=0, timeout=PATIENCE_S) as client:
        yield client


@pytest.fixture(scope="module")
def whole(system: System) -> Response:
    """The long answer to "Hi", which every other of the same seed is compared with."""
    with OpenAI(base_url=f"{system.base_url}/v1", api_key="none", max_retries=0, timeout=PATIENCE_S) as client:
        return client.responses.create(input="Hi", **LONG)


def said(response: Response) -> list[tuple[str, str]]:
    """What an answer says, whatever its ids."""
    parts: list[Any] = [(item.type, part.text) for item in response.output for part in item.content]  # type: ignore[union-attr]
    return parts


def ended(client: OpenAI, name: str) -> Response:
    """A response once it has ended."""
    deadline = time.monotonic() + PATIENCE_S
    while (response := client.responses.retrieve(name)).status in ("queued", "in_progress"):
        assert time.monotonic() < deadline, response
        time.sleep(0.05)
    return response


def kill_gateway(system: System) -> None:
    """kill -9 the gateway, and wait for the next one."""
    system.kill_child(GATEWAY)
    system.wait_until_ready()


def deltas(events: list[Any]) -> list[tuple[str, str]]:
    """The text of each output item, by its id."""
    found: dict[str, str] = {}
    for event in events:
        if event.type.endswith(".delta"):
            found[event.item_id] = found.get(event.item_id, "") + event.delta
    return list(found.items())


def test_streamed_and_whole_are_the_same(client: OpenAI, whole: Response) -> None:
    events = list(client.responses.create(input="Hi", stream=True, **LONG))
    assert events[-1].type == "response.incomplete"
    assert said(events[-1].response) == said(whole)
    assert [text for _, text in deltas(events)] == [text for _, text in said(whole)]
    assert client.responses.retrieve(whole.id) == whole
    assert whole.usage is not None
    assert whole.usage.output_tokens == TOKENS


def until_killed(system: System, stream: Iterable[Any]) -> Iterator[Any]:
    """The events of a stream up to one after which its gateway is killed. What it had sent by then is left unread:
    that may be all the rest, if this process stood still."""
    for count, event in enumerate(stream):
        yield event
        if count == 6:
            system.kill_child(GATEWAY)
            return


def test_a_stream_goes_on_behind_a_killed_gateway(system: System, client: OpenAI, whole: Response) -> None:
    with client.responses.create(input="Hi", stream=True, **LONG) as stream:
        before = list(until_killed(system, stream))
    system.wait_until_ready()
    name, last = before[0].response.id, before[-1].sequence_number
    assert before[-1].type.endswith(".delta")
    after = list(client.responses.retrieve(name, stream=True, starting_after=last))
    assert after[-1].type == "response.incomplete"
    assert [text for _, text in deltas(before + after)] == [text for _, text in said(whole)]
    again = list(client.responses.retrieve(name, stream=True, starting_after=last))
    assert deltas(again) == deltas(after)
    assert again[-1] == after[-1]
    assert said(client.responses.retrieve(name)) == said(whole)


def test_an_answer_in_the_background_outlives_its_gateway(system: System, client: OpenAI, whole: Response) -> None:
    queued = client.responses.create(input="Hi", background=True, **LONG)
    assert queued.status == "queued"
    kill_gateway(system)
    response = ended(client, queued.id)
    assert (response.status, said(response)) == ("incomplete", said(whole))
    assert client.responses.retrieve(queued.id) == response


async def test_a_cancelled_response_stops_the_engine(system: System, client: OpenAI) -> None:
    queued = client.responses.create(input="Hi", background=True, max_output_tokens=3000, extra_body=LONG["extra_body"])
    assert client.responses.cancel(queued.id).status == "cancelled"
    deadline = time.monotonic() + PATIENCE_S
    while await system.running_requests():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.05)
    assert client.responses.retrieve(queued.id).status == "cancelled"


def test_a_response_that_is_too_late_has_failed(client: OpenAI) -> None:
    response = ended(client, too_late(client, 0.3))
    assert response.error is not None
    assert (response.status, response.error.code, response.error.type) == ("failed", "server_error", "timeout")


def too_late(client: OpenAI, seconds: float) -> str:
    """The id of a response that has less time than it takes, but more than it takes to be queued."""
    late = {"X-Request-Timeout": f"{seconds}"}
    long: dict[str, Any] = {"max_output_tokens": 3000, "extra_body": LONG["extra_body"]}
    try:
        return client.responses.create(input="Hi", background=True, extra_headers=late, **long).id
    except openai.InternalServerError as error:
        if error.status_code != 504 or seconds > PATIENCE_S:
            raise
    return too_late(client, 10 * seconds)  # the gateway stood still


def test_a_conversation_with_a_picture_goes_on_by_its_id(system: System, client: OpenAI) -> None:
    content: list[Any] = [{"type": "input_image", "image_url": IMAGE, "detail": "auto"}, text := input_text("What?")]
    first = client.responses.create(input=[{"role": "user", "content": content}], **SHORT)
    kill_gateway(system)
    second = client.responses.create(input="And?", previous_response_id=first.id, **SHORT)
    other: list[Any] = [{"role": "user", "content": [text]}]
    without = client.responses.create(input=other, **SHORT)
    assert second.usage is not None
    assert without.usage is not None
    assert second.usage.input_tokens > without.usage.input_tokens + 4, "the picture and the first answer are in it"
    by_hand = [{"role": "user", "content": content}, *(item.model_dump() for item in first.output)]
    same = client.responses.create(input=[*by_hand, {"role": "user", "content": "And?"}], **SHORT)
    assert said(same) == said(second)


def input_text(text: str) -> dict[str, str]:
    return {"type": "input_text", "text": text}


def test_a_deleted_response_is_gone(client: OpenAI) -> None:
    made = client.responses.create(input="Hi", **SHORT)
    client.responses.delete(made.id)
    for call in (client.responses.retrieve, client.responses.delete):
        with pytest.raises(openai.NotFoundError):
            call(made.id)


def test_a_bad_picture_is_named_where_it_stands(client: OpenAI) -> None:
    content: Any = [{"type": "input_image", "image_url": "data:image/png;base64,AAAA"}]
    with pytest.raises(openai.BadRequestError) as refused:
        client.responses.create(input=[{"role": "user", "content": content}], **SHORT)
    assert refused.value.param == "input[0].content[0].image_url"


def test_the_pages_examples_are_answered_as_it_says(system: System) -> None:
    name = ID
    with httpx.Client(base_url=system.base_url, timeout=PATIENCE_S) as http:
        for method, path, body, status, answer in examples("responses.md"):
            if body is not None and "max_output_tokens" in body:
                body["min_tokens"] = body["max_output_tokens"]  # of drawn weights any token may be the end
            if body is not None and "previous_response_id" in body:
                body["previous_response_id"] = name
            reply = http.request(method, path.replace(ID, name), json=body)
            assert reply.status_code == status, (method, path, reply.text)
            check(answer, reply.json(), f"{method} {path}")
            if method == "POST" and status == 200:
                name = reply.json()["id"]
