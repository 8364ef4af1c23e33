"""Bad requests: each is a 4xx that names the field, disturbs no other request, and leaves nothing behind."""

import io
import struct
import zlib
from typing import Any

import av
import httpx
import pytest
from answers import ask, collected, image, text, user, video
from machine import PATIENCE_S
from openai import APIStatusError, OpenAI
from system import System, data_url, encoded, file_server, mp4, picture

PNG = encoded(picture(56, 56), "PNG")
JPEG = encoded(picture(300, 200), "JPEG")
GOOD = {"messages": user("Hello")}
CONTENT = "messages[0].content"


def huge_png(width: int, height: int) -> bytes:
    """A PNG whose header claims so many pixels, and whose few bytes would inflate to that."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    row = bytes(1 + (width + 7) // 8)
    packed = zlib.compressobj()
    data = b"".join(packed.compress(row) for _ in range(height)) + packed.flush()
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def soundtrack() -> bytes:
    """An MP4 with sound and not one frame."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame(format="fltp", layout="mono", samples=1024)
        frame.sample_rate = 16000
        for plane in frame.planes:
            plane.update(bytes(plane.buffer_size))
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return file.getvalue()


def images(*data: bytes) -> dict[str, Any]:
    return {"messages": user(*(image(data_url(one, "image/png")) for one in data), text("What is this?"))}


def linked(url: str) -> dict[str, Any]:
    return {"messages": user(text("What is this?"), image(url))}


def film(data: bytes, **options: Any) -> dict[str, Any]:
    return {"messages": user({"type": "video_url", "video_url": {"url": data_url(data, "video/mp4"), **options}})}


def tool(**function: Any) -> dict[str, Any]:
    return {**GOOD, "tools": [{"type": "function", "function": function}]}


# name: (the request, status, the field it is about)
BAD: dict[str, tuple[dict[str, Any], int, str]] = {
    "a model of another type": ({**GOOD, "model": 17}, 400, "model"),
    "no messages": ({"messages": []}, 400, "messages"),
    "a role nobody knows": ({"messages": [{"role": "robot", "content": "x"}]}, 400, "messages[0].role"),
    "a message without a role": ({"messages": [{"content": "x"}]}, 400, "messages[0].role"),
    "content of another type": ({"messages": [{"role": "user", "content": 3}]}, 400, CONTENT),
    "a user who says a number": ({"messages": [{"role": "user", "content": 3}]}, 400, CONTENT),
    "a part nobody knows": ({"messages": user({"type": "smell"}, text("x"))}, 400, f"{CONTENT}[0]"),
    "a prompt that is too long": ({"messages": user("word " * 20_000)}, 400, "messages"),
    "max_tokens of zero": ({**GOOD, "max_tokens": 0}, 400, "max_tokens"),
    "max_tokens of another type": ({**GOOD, "max_tokens": "many"}, 400, "max_tokens"),
    "a negative temperature": ({**GOOD, "temperature": -1}, 400, "temperature"),
    "top_p above one": ({**GOOD, "top_p": 1.5}, 400, "top_p"),
    "no choices": ({**GOOD, "n": 0}, 400, "n"),
    "too many choices": ({**GOOD, "n": 1000}, 400, "n"),
    "a seed that is no integer": ({**GOOD, "seed": 1.5}, 400, "seed"),
    "a penalty out of range": ({**GOOD, "presence_penalty": 3}, 400, "presence_penalty"),
    "a bias for no token": ({**GOOD, "logit_bias": {"99999999": 1}}, 400, "logit_bias"),
    "a stop of another type": ({**GOOD, "stop": 7}, 400, "stop"),
    "too many stops": ({**GOOD, "stop": ["x"] * 100}, 400, "stop"),
    "top_logprobs alone": ({**GOOD, "top_logprobs": 2}, 400, "top_logprobs"),
    "too many top_logprobs": ({**GOOD, "logprobs": True, "top_logprobs": 50}, 400, "top_logprobs"),
    "a format we do not have": ({**GOOD, "response_format": {"type": "yaml"}}, 400, "response_format.type"),
    "a tool without a name": (tool(description="x"), 400, "tools[0].function.name"),
    "a tool that is not there": ({**GOOD, "tool_choice": "required"}, 400, "tool_choice"),
    "a forced call that no grammar can check": (
        {**tool(name="f", parameters={"type": "object", "not": {}}), "tool_choice": "required"},
        400,
        "tools",
    ),
    "an image in a system message": (
        {"messages": [{"role": "system", "content": [image(data_url(PNG, "image/png"))]}, *GOOD["messages"]]},
        400,
        f"{CONTENT}[0]",
    ),
    "too many images": (images(PNG, PNG, PNG, PNG), 400, f"{CONTENT}[3].image_url"),
    "a truncated image": (
        {"messages": user(text("x"), image(data_url(JPEG[: len(JPEG) // 2], "image/jpeg")))},
        400,
        f"{CONTENT}[1].image_url",
    ),
    "an image of 900 million pixels": (images(huge_png(30_000, 30_000)), 400, f"{CONTENT}[0].image_url"),
    "an image that is a text": (images(b"hello"), 400, f"{CONTENT}[0].image_url"),
    "an image that is empty": (images(b""), 400, f"{CONTENT}[0].image_url"),
    "an image called a video": ({"messages": user(video(data_url(PNG, "image/png")))}, 400, f"{CONTENT}[0].video_url"),
    "a data URL that is not base64": (linked("data:image/png;base64,%%%%"), 400, f"{CONTENT}[1].image_url"),
    "a data URL without base64": (linked("data:image/png,hello"), 400, f"{CONTENT}[1].image_url"),
    "a link to a file": (linked("file:///etc/passwd"), 400, f"{CONTENT}[1].image_url"),
    "a link to a cloud's metadata": (linked("http://169.254.169.254/latest/"), 400, f"{CONTENT}[1].image_url"),
    "a link into a private network": (linked("http://10.1.2.3/a.png"), 400, f"{CONTENT}[1].image_url"),
    "a link to this machine by another name": (linked("http://[::1]/a.png"), 400, f"{CONTENT}[1].image_url"),
    "a video without a frame": (film(soundtrack()), 400, f"{CONTENT}[0].video_url"),
    "a video that is noise": (film(bytes(range(256)) * 8), 400, f"{CONTENT}[0].video_url"),
    "a video with contradicting options": (film(mp4(4), min_frames=9, max_frames=3), 400, f"{CONTENT}[0].video_url"),
}


def refused(client: OpenAI, **request: Any) -> APIStatusError:
    with pytest.raises(APIStatusError) as error:
        ask(client, **request)
    return error.value


@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize(("request_", "status", "field"), BAD.values(), ids=BAD)
def test_a_bad_request_is_refused_by_the_name_of_its_field(
    client: OpenAI, request_: dict[str, Any], status: int, field: str, streamed: bool
) -> None:
    error = refused(client, **request_, stream=streamed)
    assert error.status_code == status, error.message
    assert field in error.body["message"]
    assert (error.body["param"] or "").startswith(field)
    assert error.type == "invalid_request_error"
    assert error.request_id


def test_a_link_that_leads_nowhere_or_to_something_else(client: OpenAI) -> None:
    with file_server({"/page": ("text/html", b"<html></html>")}) as files:
        for path in ("/gone.png", "/page"):
            error = refused(client, **linked(files + path))
            assert error.status_code == 400
            assert f"{CONTENT}[1].image_url" in error.body["message"]


@pytest.mark.parametrize("body", [b"", b"[]", b"{", b'{"messages": ' + b"[" * 1000, b"\xff\xfe"])
def test_a_body_that_is_no_request(system: System, body: bytes) -> None:
    reply = httpx.post(f"{system.base_url}/v1/chat/completions", content=body, timeout=PATIENCE_S)
    assert reply.status_code == 400
    assert reply.json()["error"]["message"]


async def test_after_all_of_them_the_pipeline_serves_and_nothing_is_left(system: System, client: OpenAI) -> None:
    before = collected(ask(client, **GOOD, seed=1))
    for request_, _, _ in BAD.values():
        refused(client, **request_)
    assert collected(ask(client, **GOOD, seed=1))["choices"] == before["choices"]
    assert collected(ask(client, **images(PNG), seed=1))["choices"]
    assert await system.left_behind() == {}
