"""Held-out questions of each kind, as requests of the API, and the judgement of an answer."""

import base64
import io
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import av
import numpy as np
from PIL import Image

from benchmarks.demo_model import corpus, draw
from benchmarks.demo_model.sample import VIDEO_FPS, Message, Part, Sample

# What a set is called: the generator it comes from, and which of its kinds belong to it.
SETS: dict[str, tuple[str, Callable[[str], bool]]] = {
    "shapes, colours, places": (
        "scenes",
        lambda kind: kind in ("scene colour", "scene shape", "scene place", "scene presence"),
    ),
    "counts up to 6": ("scenes", lambda kind: kind == "scene count"),
    "descriptions": ("scenes", lambda kind: kind == "scene description"),
    "words up to 6 letters": ("words", lambda kind: kind == "word"),
    "numbers": ("words", lambda kind: kind == "number"),
    "charts": ("charts", lambda kind: True),
    "two pictures": ("pairs", lambda kind: True),
    "video counts": ("videos", lambda kind: kind == "video count"),
    "video motion": ("videos", lambda kind: kind == "video motion"),
    "sums and products": ("arithmetic", lambda kind: kind in ("sum", "product")),
    "other arithmetic": ("arithmetic", lambda kind: kind not in ("sum", "product")),
    "tool calls": ("tools", lambda kind: kind == "tool"),
    "tool results": ("tools", lambda kind: kind == "tool result"),
    "no tool fits": ("tools", lambda kind: kind == "tool none"),
    "JSON": ("json", lambda kind: True),
    "Millrace": ("facts", lambda kind: True),
    "text tasks": ("text", lambda kind: True),
    "system prompts": ("instructions", lambda kind: True),
    "unknown": ("chat", lambda kind: kind == "unknown"),
}


@dataclass(frozen=True, slots=True)
class Question:
    """A held-out sample and the body of its request."""

    set_name: str
    sample: Sample
    body: dict[str, Any]

    def is_right(self, message: dict[str, Any]) -> bool:
        """True if the assistant's message is the answer: exactly, but for the form of JSON."""
        calls = [call["function"] for call in message.get("tool_calls") or ()]
        wanted = [(call.name, call.arguments) for call in self.sample.calls]
        if [(call["name"], _parsed(call["arguments"])) for call in calls] != wanted:
            return False
        content = (message.get("content") or "").strip()
        if self.sample.kind == "json":
            return bool(_parsed(content) == json.loads(self.sample.answer))
        return content == self.sample.answer


def questions(
    per_set: int, seed: int, *, thinking: bool = True, own_size: bool = False, only: str | None = None
) -> Iterator[Question]:
    """The questions of all sets, the same ones for a seed whatever their number.

    With `own_size` only those about pictures, which are then JPEG files of sizes that the encoder shows on a canvas.
    """
    for name, (generator, belongs) in SETS.items():
        if only not in (None, name) or (own_size and generator not in corpus.PICTURES):
            continue
        rng = random.Random(f"questions {seed} {name}")
        count = 0
        while count < per_set:
            size = rng.choice(draw.CANVASES)
            sample = corpus.sample(rng, draw.own_size(rng, size) if own_size else size, held_out=True, only=generator)
            if belongs(sample.kind):
                count += 1
                yield Question(name, sample, _body(sample, thinking, as_jpeg=own_size))


def _body(sample: Sample, thinking: bool, as_jpeg: bool) -> dict[str, Any]:
    body: dict[str, Any] = {
        "messages": [_message(message, as_jpeg) for message in sample.messages],
        "temperature": 0,
        "max_tokens": 400,
        "chat_template_kwargs": {"enable_thinking": thinking},
    }
    return body | ({"tools": list(sample.tools)} if sample.tools else {})


def _message(message: Message, as_jpeg: bool) -> dict[str, Any]:
    made: dict[str, Any] = {"role": message.role, "content": [_part(part, as_jpeg) for part in message.parts]}
    if message.role != "user":
        made["content"] = "".join(part for part in message.parts if isinstance(part, str))
    if message.role == "tool":
        made["tool_call_id"] = "call_0"
    if message.reasoning:
        made["reasoning_content"] = message.reasoning
    if message.calls:
        made["tool_calls"] = [
            {
                "id": f"call_{i}",
                "type": "function",
                "function": {"name": call.name, "arguments": json.dumps(call.arguments)},
            }
            for i, call in enumerate(message.calls)
        ]
    return made


def _part(part: Part, as_jpeg: bool) -> dict[str, Any]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    if isinstance(part, list):
        return {"type": "video_url", "video_url": {"url": _data_url("video/mp4", video_bytes(part))}}
    url = _data_url("image/jpeg", draw.jpeg(part, 85)) if as_jpeg else _data_url("image/png", picture_bytes(part))
    return {"type": "image_url", "image_url": {"url": url}}


def _data_url(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def picture_bytes(pixels: np.ndarray) -> bytes:
    """A PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def video_bytes(frames: list[np.ndarray]) -> bytes:
    """An MP4 file in H.264, as cameras and browsers make them, at a good quality."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=VIDEO_FPS, options={"crf": "12"})
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        for pixels in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return buffer.getvalue()


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None
