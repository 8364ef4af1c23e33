"""One trace through the four services, as a collector receives it from the running system."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from collector import Collector, Received, collector, silent_collector
from openai import BadRequestError, OpenAI
from system import System, data_url, encoded, picture, running, started

from cli.demo import write_demo

CALLER_SPAN = "00f067aa0ba902b7"
SERVER = "POST /v1/chat/completions"
STAGES = {
    SERVER: "millrace-gateway",
    "encode": "millrace-mm_encoder",
    "queue": "millrace-engine",
    "prefill": "millrace-engine",
    "decode": "millrace-engine",
    "postprocess": "millrace-postproc",
}
SECRET = "xyzzyplugh"  # in no word of ours
SOON = {"OTEL_BSP_SCHEDULE_DELAY": "100"}  # milliseconds
MS = 1_000_000  # nanoseconds; entries of streams are dated to one


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("traced") / "demo"
    write_demo(directory, dtype="float32")
    return directory


@pytest.fixture(scope="module")
def got() -> Iterator[Collector]:
    with collector() as got:
        yield got


@pytest.fixture(scope="module")
def system(model: Path, got: Collector, tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    arguments = ["--model", str(model), "--otlp-endpoint", got.url, "--trace-ratio", "1"]
    with running(arguments, tmp_path_factory.mktemp("system"), SOON) as system:
        yield system


@pytest.fixture
def client(system: System) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{system.base_url}/v1", api_key="none", max_retries=0) as client:
        yield client


def traceparent(number: int, flags: str = "01") -> dict[str, str]:
    return {"traceparent": f"00-{number:032x}-{CALLER_SPAN}-{flags}"}


def asked(text: str, image: bytes | None = None) -> list[Any]:
    part = {"type": "image_url", "image_url": {"url": data_url(image or b"", "image/png")}}
    return [{"role": "user", "content": [*([part] if image else []), {"type": "text", "text": text}]}]


def have(*names: str) -> Callable[[list[Received]], bool]:
    return lambda spans: sorted(span.name for span in spans) == sorted(names)


def by_name(spans: list[Received]) -> dict[str, Received]:
    return {span.name: span for span in spans}


def test_a_picture_and_a_question_are_one_trace_through_all_stages(client: OpenAI, got: Collector) -> None:
    before = time.time_ns()
    stream = client.chat.completions.create(
        model="demo",
        messages=asked(f"What is a {SECRET}?", encoded(picture(84, 56), "PNG")),
        max_tokens=12,
        temperature=0.5,
        stream=True,
        stream_options={"include_usage": True},
        extra_headers=traceparent(1),
        extra_body={"ignore_eos": True, "min_tokens": 12},
    )
    chunks = list(stream)
    after = time.time_ns()
    usage = chunks[-1].usage
    assert usage is not None

    spans = by_name(got.wait(have(*STAGES), f"{1:032x}"))
    assert {name: span.service for name, span in spans.items()} == STAGES
    server, encode, queue, prefill, decode, postprocess = (spans[name] for name in STAGES)
    assert server.parent == CALLER_SPAN
    assert {span.parent for name, span in spans.items() if name != SERVER} == {server.id}
    assert not any(span.failed for span in spans.values())

    assert before <= server.start <= encode.start <= queue.start + MS
    assert queue.start <= encode.end  # which handed it on a moment before
    assert queue.start <= queue.end == prefill.start <= prefill.end == decode.start <= decode.end
    assert queue.end <= postprocess.start <= min(postprocess.end, server.end)
    [first] = server.events
    assert first.name == "first_token"
    assert prefill.end <= first.at <= min(server.end, after)

    name = chunks[0].id
    for span in spans.values():
        assert span.attributes["millrace.request_id"] == name.removeprefix("chatcmpl-")
        assert span.resource["service.instance.id"].startswith(span.service.removeprefix("millrace-"))
    assert (
        server.attributes
        | {
            "http.route": "/v1/chat/completions",
            "http.response.status_code": 200,
            "gen_ai.operation.name": "chat",
            "gen_ai.request.model": "demo",
            "gen_ai.request.max_tokens": 12,
            "gen_ai.request.temperature": 0.5,
            "gen_ai.request.stream": True,
            "gen_ai.response.id": name,
            "gen_ai.response.finish_reasons": ["length"],
            "gen_ai.usage.input_tokens": usage.prompt_tokens,
            "gen_ai.usage.output_tokens": 12,
        }
        == server.attributes
    )
    images = {"millrace.images": 1, "millrace.videos": 0, "millrace.cache_hits": 0, "millrace.outcome": "done"}
    assert encode.attributes | images == encode.attributes
    assert encode.attributes["gen_ai.usage.input_tokens"] == usage.prompt_tokens
    assert prefill.attributes["gen_ai.usage.input_tokens"] == usage.prompt_tokens
    assert prefill.attributes["gen_ai.usage.cache_read.input_tokens"] == 0
    ended = {"gen_ai.usage.output_tokens": 12, "gen_ai.response.finish_reasons": ["length"], "millrace.epoch": 1}
    assert decode.attributes | ended | {"millrace.preemptions": 0, "millrace.attempt": 1} == decode.attributes
    assert postprocess.attributes | ended == postprocess.attributes


def test_without_a_header_a_trace_begins(client: OpenAI, got: Collector) -> None:
    reply = client.chat.completions.create(model="demo", messages=asked("Hello"), max_tokens=2)

    def this(spans: list[Received]) -> list[Received]:
        return [span for span in spans if span.attributes.get("gen_ai.response.id") == reply.id]

    [server] = this(got.wait(lambda spans: bool(this(spans))))
    assert (server.parent, len(server.trace)) == ("", 32)
    rest = got.wait(have(*(STAGES.keys() - {"encode"})), server.trace)
    assert {span.parent for span in rest} == {"", server.id}


def test_what_a_caller_does_not_record_is_not_recorded(client: OpenAI, got: Collector) -> None:
    for number, flags in ((3, "00"), (4, "01")):
        client.chat.completions.create(
            model="demo", messages=asked("Hello"), max_tokens=2, extra_headers=traceparent(number, flags)
        )
    got.wait(have(*(STAGES.keys() - {"encode"})), f"{4:032x}")  # each service sends its spans in their order
    assert bytes.fromhex(f"{3:032x}") not in b"".join(got.bodies)


def test_a_picture_that_is_none_is_the_encoders_error_and_no_servers(client: OpenAI, got: Collector) -> None:
    with pytest.raises(BadRequestError) as refused:
        client.chat.completions.create(
            model="demo", messages=asked(f"See {SECRET}", b"no picture"), extra_headers=traceparent(5)
        )
    server, encode = got.wait(have(SERVER, "encode"), f"{5:032x}")
    assert (server.name, server.failed, server.attributes["http.response.status_code"]) == (SERVER, False, 400)
    assert (encode.failed, encode.attributes["error.type"]) == (True, refused.value.code)


def test_a_request_that_is_refused_at_the_door(client: OpenAI, got: Collector) -> None:
    with pytest.raises(BadRequestError):
        client.chat.completions.create(
            model="demo", messages=asked(SECRET), max_tokens=-2, extra_headers=traceparent(6)
        )
    [server] = got.wait(have(SERVER), f"{6:032x}")
    assert server.attributes["http.response.status_code"] == 400


def test_several_choices_share_a_trace(client: OpenAI, got: Collector) -> None:
    reply = client.chat.completions.create(
        model="demo", messages=asked("Hello"), n=2, max_tokens=2, extra_headers=traceparent(7)
    )
    stages = [name for name in STAGES if name not in (SERVER, "encode")]
    spans = got.wait(have(SERVER, *stages, *stages), f"{7:032x}")
    first = reply.id.removeprefix("chatcmpl-")
    assert {span.attributes["millrace.request_id"] for span in spans} == {first, f"{first}-1"}
    server = by_name(spans)[SERVER]
    assert server.attributes["gen_ai.request.choice.count"] == 2
    assert len(server.attributes["gen_ai.response.finish_reasons"]) == 2


def test_after_a_crash_the_next_engine_records_its_part(client: OpenAI, system: System, got: Collector) -> None:
    for trace in range(80, 90):
        stream = client.chat.completions.create(
            model="demo",
            messages=asked("A long story."),
            max_tokens=300,
            stream=True,
            extra_headers=traceparent(trace),
            extra_body={"ignore_eos": True},
        )
        for number, _ in enumerate(stream):
            if number == 10:
                system.kill_child("services.engine")
        spans = got.wait(have(*(STAGES.keys() - {"encode"})), f"{trace:032x}")
        if by_name(spans)["queue"].attributes["millrace.epoch"] > 1:
            break  # else it was killed when it had generated all, as on a machine so busy that we read late
    server, queue, prefill, decode = (by_name(spans)[name] for name in (SERVER, "queue", "prefill", "decode"))
    assert {queue.parent, prefill.parent, decode.parent} == {server.id}
    assert [span.attributes["millrace.epoch"] for span in (queue, prefill, decode)] == [2, 2, 2]
    assert prefill.attributes["millrace.resumed_tokens"] > 0
    assert decode.attributes["gen_ai.usage.output_tokens"] == 300
    [first] = server.events
    assert first.at < queue.start  # the client had some of it by then


def test_nothing_that_was_asked_or_answered_is_in_what_is_sent(client: OpenAI, got: Collector) -> None:
    reply = client.chat.completions.create(
        model="demo",
        messages=[{"role": "system", "content": SECRET}, *asked(SECRET, encoded(picture(56, 84), "PNG"))],
        max_tokens=30,
        stop=[SECRET],
        extra_headers=traceparent(9),
        extra_body={"ignore_eos": True},
    )
    said = reply.choices[0].message
    answer = (said.content or "") + said.model_extra["reasoning_content"]
    assert len(answer) > 30
    got.wait(have(*STAGES), f"{9:032x}")
    everything = b"".join(got.bodies)
    assert reply.id.encode() in everything
    assert SECRET.encode() not in everything
    assert not any(answer[i : i + 12].encode() in everything for i in range(len(answer) - 12))


def test_a_collector_that_does_not_answer_delays_neither_answers_nor_the_end(model: Path, tmp_path: Path) -> None:
    with (
        silent_collector() as url,
        started(["--model", str(model), "--otlp-endpoint", url], tmp_path / "system", SOON) as system,
    ):
        system.wait_until_ready()
        with OpenAI(base_url=f"{system.base_url}/v1", api_key="none", max_retries=0) as client:
            image = encoded(picture(84, 56), "PNG")
            for _ in range(3):
                reply = client.chat.completions.create(model="demo", messages=asked("Hello", image), max_tokens=2)
                assert reply.choices[0].finish_reason
        system.stop()  # in order: a service that waited for the collector would be killed
